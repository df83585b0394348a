"""Detection of drivers that never notify, such as SPDK's: their queues are polled as with ``poll=on``.

A driver that sends available buffer notifications (virtio 1.4, 2.9) is known by its first one, and the search ends.
Until then queues are looked at now and then, at growing intervals: that costs next to nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from vfiouser_virtio.virtio.polling import pulse

# All times are in seconds.
FIRST_LOOK = 0.002
LONGEST_PAUSE = 5.0
"""The pauses between two looks double up to this one: so long can a first request have to wait for the verdict."""
GRACE = 0.5
"""How long a notification may follow the buffers that it is for: on a busy machine a virtual CPU rests in between. The
verdict is for good, since a queue that is polled asks for no notifications."""


class Watched(Protocol):
    """Interface of a queue that is watched."""

    @property
    def notified(self) -> bool: ...

    @property
    def overlooked(self) -> bool: ...

    def peek(self, by_message: bool) -> bool: ...


async def serve_unnotified(queues: Sequence[Watched], found: Callable[[], None]) -> None:
    """Return when one of the queues is notified; else, once a buffer lies there for `GRACE`, ``found()`` and poll.

    Queues in memory that takes messages are not looked at.
    """
    pause = FIRST_LOOK
    while not any(queue.notified for queue in queues):
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        if any(queue.overlooked for queue in queues):
            await trio.sleep(GRACE)
            if any(queue.overlooked for queue in queues) and not any(queue.notified for queue in queues):
                found()
                await pulse([queue.peek for queue in queues])
