"""Chains that can no longer be completed: garbage of the device, for which the driver waits until a reset.

The ring itself refers to every chain in flight, so none is ever collected, and a finalizer would cost every chain.
Instead references are counted, a second after a task has started to wait for a queue, and again, less and less often,
while chains are in flight::

    references of a chain in flight: its ring, the device's
                                               none: it is lost
                                         the variable of an ``async for`` that waits for the next one: lost as well

Nothing is paid for it per chain, and nothing by a device that is idle.
"""

import opcode
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CoroutineType, FrameType
from typing import Any

import trio

from vfiouser_virtio.virtio.author_line import shown
from vfiouser_virtio.virtio.queue import Bursts, Queue
from vfiouser_virtio.virtio.virtqueue import Virtqueue
from vfiouser_virtio.vring import Chain

# Seconds.
_FIRST, _MOST = 1.0, 60.0
_GET_ANEXT = opcode.opmap["GET_ANEXT"]
_ANEXT = {Queue.__anext__.__code__, Bursts.__anext__.__code__}
# So many code units before the one at which a coroutine waits there is GET_ANEXT, if it waits in an ``async for``.
_NEAR = 5


async def watch_for_lost_chains(queues: Sequence[Virtqueue], report: Callable[[str], None]) -> None:
    """Return when a chain has been lost, and ``report`` was told of it; look only while chains are in flight."""
    parked = trio.lowlevel.ParkingLot()

    def on_park() -> None:  # once for each look: every wait would pay for more
        for queue in queues:
            queue.call_on_park(None)
        parked.unpark_all()

    try:
        while True:
            delay, outstanding = _FIRST, True
            while outstanding:
                await trio.sleep(delay)
                delay, outstanding = min(2 * delay, _MOST), False
                for queue in queues:
                    chains = queue.uncompleted_chains()
                    if lost := next(_lost(queue, chains), None):
                        report(lost)
                        return
                    outstanding = outstanding or bool(chains)
            for queue in queues:
                queue.call_on_park(on_park)
            await parked.park()
    finally:
        for queue in queues:
            queue.call_on_park(None)


def _lost(queue: Virtqueue, chains: list[Chain]) -> Iterator[str]:
    loops = [frame for task in queue.waiters if (frame := _loop(task.coro))]
    at = f" (its loop: {shown(loops[0].f_code.co_filename)}:{loops[0].f_lineno})" if loops else ""
    for position in range(len(chains)):
        held = _references(chains, position) - _UNHELD
        if not held or (held == 1 and any(_is_a_local(frame, chains[position]) for frame in loops)):
            yield (
                f"queue {queue.index}: chain {chains[position].head:#x} was not completed, and nothing in the device "
                f"will do it any more: the driver waits for it until it resets the device{at}"
            )


def _references(chains: list[Chain], position: int) -> int:
    return sys.getrefcount(chains[position])


def _references_of_nobody() -> int:
    """What `_references` is for a chain that only its ring and the list refer to."""
    chains = [Chain.of(None, 0, (), 0, 0, None)]
    ring = {0: chains[0]}
    count = _references(chains, 0)
    ring.clear()
    return count


_UNHELD = _references_of_nobody()


def _loop(coroutine: Any) -> FrameType | None:
    """The frame of a task that waits in ``async for chain in queue``, and then forgets the chain it has."""
    while isinstance(coroutine, CoroutineType):
        below = coroutine.cr_await
        if isinstance(below, CoroutineType) and below.cr_code in _ANEXT:
            frame = coroutine.cr_frame
            assert frame is not None  # it is not running, and has not ended
            code, last = frame.f_code.co_code, frame.f_lasti
            return frame if _GET_ANEXT in code[max(last - 2 * _NEAR, 0) : last : 2] else None
        coroutine = below
    return None


def _is_a_local(frame: FrameType, chain: Chain) -> bool:
    return sum(value is chain for value in frame.f_locals.values()) == 1
