"""Closing what a backend has open on the host."""

import trio

from vfiouser_virtio.fds import close_all


def close_fd(fd: int) -> None:
    """Close it without waiting for its file system; tasks that wait for it get ClosedResourceError."""
    try:
        trio.lowlevel.notify_closing(fd)
    except RuntimeError:
        pass  # not inside trio: no task waits
    close_all([fd])
