"""Processes, as the kernel shows them in /proc."""

import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Those that a process with one thread has, the oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Nothing of it runs any more, though in a container nobody may ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids: int, patience: float = 60) -> None:
    """Wait for their ends: a process that was killed, or whose files are closed already, still has some way to go."""
    deadline = time.monotonic() + patience
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if not is_gone(pid)]
        time.sleep(0.01)
