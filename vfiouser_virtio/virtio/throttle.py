"""Throttle of a device with rate limits: what its queues hand out is paid for, and they stand still until it can be.

::

    Ring.pop ─▶ MeteredBurst ─ popleft ─▶ device ─▶ Chain.complete ─▶ MeteredRing ─▶ used ring
                                  │ pays                                   │ bytes that were not written come back
                                  ▼                                        ▼
                               Throttle: two buckets ── empty: `Stop.THROTTLED` for all queues, until its timer ends it

A chain that has to wait stays where others wait as well: taken from the ring and not handed out, or in the ring. So a
reset, a suspension and another device treat it as ever, and without limits nothing of this is there.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar, cast

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.virtio.limits import Limits
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.vring import Chain, Ring
from vfiouser_virtio.vring.ring import Single

_R = TypeVar("_R", bound=Ring)
# Seconds: a wait that rounding makes of next to nothing would not move the clock, and so never end.
_NAP = 1e-4


class Limited(Protocol):
    """Interface of a virtqueue to its device's throttle."""

    def limit(self, meter: "QueueMeter") -> None: ...
    def stop(self, reason: Stop) -> None: ...
    def start(self, reason: Stop) -> None: ...


class Throttle:
    """Limits of one device, in effect on all of its queues. They last as long as the device: a reset frees nothing."""

    def __init__(self, limits: Limits, queues: Sequence[Limited]) -> None:
        self._queues = queues
        # It may be made before the event loop begins: a bucket is full then, and remains so.
        self._requests, self._bytes = limits.buckets(float("-inf"))
        self._halted = False
        self._changed = trio.Event()
        for queue in queues:
            queue.limit(QueueMeter(self))

    def available(self) -> tuple[float, float]:
        """Requests and bytes that could be paid for now; less than nothing is owed."""
        now = trio.current_time()
        return self._requests.available(now), self._bytes.available(now)

    def pay(self, requests: int, octets: int, *, may_halt: bool = True) -> None:
        """Pay for what is handed out, perhaps more than there is. ``may_halt``: stop the queues if nothing is left."""
        now = trio.current_time()
        self._requests.spend(requests, now)
        self._bytes.spend(octets, now)
        if may_halt and not self._halted and self._wait(now):
            self._halted = True
            for queue in self._queues:
                queue.stop(Stop.THROTTLED)
            self._changed.set()

    def refund(self, requests: int, octets: int) -> None:
        """Give back what was not used."""
        self.pay(-requests, -octets, may_halt=False)
        if self._halted:
            # Not here, in the midst of showing what was used: the timer's task looks again.
            self._changed.set()

    async def serve(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` and the timer beside it."""
        async with background() as tasks:
            tasks.start_soon(self._end_halts)
            await work()

    async def _end_halts(self) -> None:
        while True:
            if not self._halted:
                await self._changed.wait()
            elif wait := self._wait(trio.current_time()):
                with trio.move_on_after(max(wait, _NAP)):
                    await self._changed.wait()
            else:
                self._halted = False
                for queue in self._queues:
                    queue.start(Stop.THROTTLED)
            if self._changed.is_set():
                self._changed = trio.Event()

    def _wait(self, now: float) -> float:
        return max(self._requests.wait(now), self._bytes.wait(now))


class QueueMeter:
    """Payments for the chains of one queue that are in flight, by head."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._paid: dict[int, tuple[int, int]] = {}  # bytes, and those among them that are room to be written
        self.burst = MeteredBurst(self)
        """What `Virtqueue.burst` is from now on."""
        self.promised = 0
        """So many chains that the device needs together are handed out whatever they cost: see `Queue.wait`."""

    def takes(self, chain: Chain) -> None:
        """A chain is handed out."""
        octets = sum(chain.layout[1::4])
        self._paid[chain.head] = octets, chain.room
        self.promised = max(self.promised - 1, 0)
        self._throttle.pay(1, octets, may_halt=not self.promised)

    def take_singles(self, singles: list[Single], *, writable: bool) -> int:
        """Buffers are about to be handed out in bulk: how many of them, the first ones, can be paid for; they are."""
        requests, octets = self._throttle.available()
        count = total = 0
        for _, _, length in singles:
            if count + 1 > requests or total + 1 > octets:
                break
            count += 1
            total += length
        for head, _, length in singles[:count]:
            self._paid[head] = length, length if writable else 0
        if singles:
            self._throttle.pay(count, total)
        return count

    def gives_back(self, heads: Sequence[int]) -> None:
        """These are available again, and were not used."""
        paid = [self._paid.pop(head) for head in heads if head in self._paid]
        if paid:
            self._throttle.refund(len(paid), sum(octets for octets, _ in paid))

    def uses(self, completed: Sequence[int]) -> None:
        """Chains were completed: head, bytes written, head, …; a second time makes no difference."""
        unused = 0
        for head, written in zip(completed[::2], completed[1::2], strict=True):
            _, room = self._paid.pop(head, (0, written))
            unused += room - written
        if unused:
            self._throttle.refund(0, unused)

    def forgets(self) -> None:
        """The queue was reset: what was paid for is paid for."""
        self._paid.clear()
        self.promised = 0


class MeteredBurst(deque[Chain]):
    """`Virtqueue.burst` of a limited device: what is taken from its front is handed out, and paid for."""

    def __init__(self, meter: QueueMeter) -> None:
        super().__init__()
        self._meter = meter

    def popleft(self) -> Chain:
        """As that of a deque. The queue may stand still afterwards."""
        chain = super().popleft()
        self._meter.takes(chain)
        return chain


class MeteredRing(Ring):
    """Mixin before a ring, of any kind: tells a meter of singles, and of what was used. `meter` is set at once."""

    meter: QueueMeter

    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        """As `Ring.pop_singles`, of which only so many are handed out as can be paid for."""
        found: list[Single] = super().pop_singles(limit, flags)  # type: ignore[safe-super] # of the ring that follows
        count = self.meter.take_singles(found, writable=bool(flags))
        if count < len(found):
            super().undo_singles(found[count:])  # type: ignore[safe-super] # as above
        return found[:count]

    def undo_singles(self, singles: Sequence[Single]) -> None:
        """As `Ring.undo_singles`."""
        super().undo_singles(singles)  # type: ignore[safe-super] # as above
        self.meter.gives_back([head for head, _, _ in singles])

    def publish(self) -> bool:
        """As `Ring.publish`."""
        self.meter.uses(self.completed)
        return super().publish()  # type: ignore[safe-super] # as above

    def _ready(self) -> list[int]:
        self.meter.uses(self.completed)
        return super()._ready()


@cache
def metered(ring: type[_R]) -> type[_R]:
    """The class of such a ring with a meter."""
    return cast("type[_R]", type(f"Metered{ring.__name__}", (MeteredRing, ring), {}))
