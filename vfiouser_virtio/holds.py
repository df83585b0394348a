"""Completion of a `Hold`: wait for the work behind a deferred reply, with a timeout after which it is to fail."""

import trio

from vfiouser_virtio.vfio_device import Hold

HOLD_TIMEOUT = 2.0
"""Seconds until the work behind a held reply is told to fail: well within QEMU's 5 s, after which it gives up on us."""


async def wait_hold(hold: Hold, timeout: float | None = None) -> None:
    """Wait until ``hold`` has ended; after ``timeout`` seconds (default `HOLD_TIMEOUT`) tell its work to fail.

    What has been told still ends in its own time. With ``math.inf`` there is no timeout.
    """
    done = trio.Event()
    hold.when_done(done.set)
    with trio.move_on_after(HOLD_TIMEOUT if timeout is None else timeout):
        await done.wait()
    if not done.is_set():
        hold.expire()
        await done.wait()
