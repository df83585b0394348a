"""Processes, as the kernel shows them in /proc."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Those that a process with one thread has, the oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
