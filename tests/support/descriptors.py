"""File descriptors of another process, which opens and closes some meanwhile."""

import os
from contextlib import suppress


def descriptors_of(pid: int) -> dict[int, str]:
    """What each of them is, as in /proc/PID/fd."""
    folder = f"/proc/{pid}/fd"
    found = {}
    for each in os.listdir(folder):
        with suppress(FileNotFoundError):
            found[int(each)] = os.readlink(f"{folder}/{each}")
    return found
