"""Task that waits for the events of an eventfd, and calls what handles them."""

from collections.abc import Awaitable, Callable

import trio

from vfiouser_virtio.eventfds import take


async def watch(
    fd: int, signalled: Callable[[], Awaitable[None] | None], *, valid: Callable[[], bool] | None = None
) -> None:
    """Call ``signalled`` once for all that ``fd`` has counted since the last call; what it returns is awaited.

    Ends when ``fd`` is closed, which `trio.lowlevel.notify_closing` has to tell, or when it is not ``valid`` any more:
    between the wake-up and the look, its number may have become that of another file.
    """
    try:
        while valid is None or valid():
            await trio.lowlevel.wait_readable(fd)
            if (valid is None or valid()) and take(fd):
                work = signalled()
                if work is not None:
                    await work
    except trio.ClosedResourceError:
        pass
