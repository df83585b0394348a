"""Virtqueue with faults: its rings are those of `split` and `packed`."""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.faults.later import Later
from vfiouser_virtio.faults.packed import FaultyPackedRing
from vfiouser_virtio.faults.payload import Payload
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.faults.rings import FaultyRing, RingPlace, RingSeams
from vfiouser_virtio.faults.split import FaultySplitRing
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.pieces import copy_into
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.vring import Area, Chain

MAX_SAID = 64
"""What faults have to say and the driver gives no buffers for; more than that is not said."""


class FaultyVirtqueue(Virtqueue):
    """Virtqueue with faults; ``kicked`` is told of each notification, before the queue is, ``payload`` makes those of
    what is in its buffers.
    """

    split_ring = FaultySplitRing
    packed_ring = FaultyPackedRing

    def __init__(
        self,
        *arguments: Any,
        faults: FaultPlan,
        later: Later,
        start: Callable[[Callable[[], Awaitable[None]]], None],
        kicked: Callable[[int], None],
        payload: Callable[["FaultyVirtqueue"], Payload | None],
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._faults = faults
        self._later = later
        self._start = start
        self._kicked = kicked
        self._payload = payload
        self._said: deque[bytes] = deque()
        self._saying = False

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        bound = super()._new_ring(areas)
        assert isinstance(bound.ring, FaultyRing)
        seams = RingSeams(
            later=self._later,
            republish=self._publish,
            show_late=partial(self._show_late, bound),
            views=partial(self._views, bound),
            overwrite=self._overwrite,
            overwrite_ring=lambda part, at, data: self._overwrite(areas[part].address + at, data),
            payload=self._payload(self),
        )
        bound.ring.arm(self._faults, self.index, seams)
        return bound

    def _show_late(self, bound: BoundRing, places: list[RingPlace]) -> None:
        """Send what a fault has stored in the ring by itself, where the driver does not see that: it is in our copy."""
        if bound.by_message:
            parts = bound.ring.parts
            bound.unsent += [(part, at, bytes(parts[part][at : at + length])) for part, at, length in places]
            self._publish()

    def singles(self, limit: int, flags: int) -> Singles | None:  # noqa: ARG002 - none, whatever is asked for
        """None: all buffers are taken as chains, since what is told of one depends on its chain."""
        return None

    def kick(self) -> None:
        """As `Virtqueue.kick`."""
        lost = self._faults.hit("notify-lost", self.index)
        self._kicked(self.index)
        if lost is None:
            super().kick()
        else:
            lost.did("the device does not look at the queue")

    def reset(self) -> None:
        """As `Virtqueue.reset`."""
        bound = self._bound
        if bound is not None and (hit := self._faults.hit("used-after-reset", self.index)):
            ring = bound.ring
            assert isinstance(ring, FaultyRing)
            parts = [
                (bound.areas[part].address + at, data) for (part, at, _), data in ring.ghost(hit["id"], hit["len"])
            ]
            hit.did(f"{hit['time']:g} s later: id {hit['id']:#x}, length {hit['len']:#x} at {parts[0][0]:#x}")

            def come() -> None:
                for address, data in parts:
                    self._overwrite(address, data)

            self._later(hit["time"], come)
        super().reset()

    # ---- what is in the buffers ----------------------------------------------------------------------------------

    def say(self, data: bytes) -> None:
        """Put ``data`` into the next buffer of the queue, as if the device had said it."""
        if self._spawn is not None and len(self._said) < MAX_SAID:
            self._said.append(data)
            if not self._saying:
                self._saying = True
                self._spawn(self._say_all)

    async def _say_all(self) -> None:
        try:
            while self._said:
                if not self.ready():
                    await self.wait_chain()
                chain = self.burst.popleft()
                ring = chain.ring
                assert isinstance(ring, FaultyRing)
                ring.say_honestly(chain, self._said.popleft())
        finally:
            self._saying = False

    def end_run(self) -> None:
        super().end_run()
        self._said.clear()
        self._saying = False

    def _views(self, bound: BoundRing, chain: Chain) -> list[memoryview] | None:
        """As `RingSeams.views`: guest memory, or the copy that is sent."""
        bounces = list(bound.shadow.claims.get(chain.head, ([], 0))[0])
        views: list[memoryview] = []
        try:
            for address, length in chain.ranges[chain.writable_from :]:
                if bounces and bounces[0][0] == address and len(bounces[0][1]) == length:
                    views.append(bounces.pop(0)[1])
                elif length:
                    views += self.memory.writable(address, length)
        except (NeedsMessages, Unmapped):
            return None
        return views

    def _overwrite(self, address: int, data: bytes) -> None:
        """As `RingSeams.overwrite`; nothing, where there is no memory."""
        try:
            copy_into(self.memory.writable(address, len(data)), data)
        except NeedsMessages:
            self._start(partial(self._overwrite_by_message, address, data))
        except Unmapped:
            pass

    async def _overwrite_by_message(self, address: int, data: bytes) -> None:
        try:
            await self.memory.write(address, data)
        except (PeerError, Unmapped):
            pass  # gone meanwhile, or only to be read
