"""Virtqueue with faults: its rings are those of `split` and `packed`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from vfiouser_virtio.faults.later import Later
from vfiouser_virtio.faults.packed import FaultyPackedRing
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.faults.rings import FaultyRing, RingPlace
from vfiouser_virtio.faults.split import FaultySplitRing
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.vring import Area


class FaultyVirtqueue(Virtqueue):
    """Virtqueue with faults; ``kicked`` is told of each notification, before the queue is."""

    split_ring = FaultySplitRing
    packed_ring = FaultyPackedRing

    def __init__(
        self, *arguments: Any, faults: FaultPlan, later: Later, kicked: Callable[[int], None], **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._faults = faults
        self._later = later
        self._kicked = kicked

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        bound = super()._new_ring(areas)
        assert isinstance(bound.ring, FaultyRing)
        show_late = partial(self._show_late, bound)
        bound.ring.arm(self._faults, self.index, self._later, self._publish, show_late)
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
        self._kicked(self.index)
        super().kick()
