"""Virtqueue with a journal: its ring can be gone on with after a death of the process."""

from collections.abc import Callable
from typing import Any

from vfiouser_virtio.supervision.errors import CannotResume
from vfiouser_virtio.supervision.journal import QueueJournal
from vfiouser_virtio.supervision.packed import JournaledPackedRing
from vfiouser_virtio.supervision.split import JournaledSplitRing
from vfiouser_virtio.virtio import Stop, Virtqueue
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.vring import Area

_UNTIL_KICK = Stop.UNTIL_KICK.value


class JournaledVirtqueue(Virtqueue):
    """`Virtqueue` whose rings write a journal. The rest of the arguments are its."""

    split_ring = JournaledSplitRing
    packed_ring = JournaledPackedRing

    def __init__(self, *arguments: Any, journal: QueueJournal, on_change: Callable[[], None], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._journal = journal
        self._on_change = on_change

    def kick(self) -> None:
        """As `Virtqueue.kick`; the first one of another client's driver changes what its registers are worth."""
        taken_over = self.stopped & _UNTIL_KICK
        super().kick()
        if taken_over:
            self._on_change()

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        bound = super()._new_ring(areas)
        assert isinstance(bound.ring, JournaledSplitRing | JournaledPackedRing)
        self._journal.clear()
        bound.ring.journal = self._journal
        return bound

    def registers(self) -> list[int]:
        """What the driver has set, as plain data."""
        return [self.size, self.desc, self.driver, self.device, int(self.enabled), int(self.notified)]

    def restore_registers(self, registers: list[int]) -> None:
        """What `registers` has returned, without the ring. Raises ValueError for a size that this queue cannot have."""
        size, desc, driver, device, enabled, notified = registers
        if not self.allows(size):
            raise ValueError(f"queue {self.index} cannot have {size:#x} entries, but up to {self.max_size:#x}")
        self.configure(size=size, desc=desc, driver=driver, device=device)
        self.enabled, self.notified = bool(enabled), bool(notified)

    def resume_ring(self, *, running: bool) -> int:
        """The ring of an enabled queue, from the journal; how many requests are in flight.

        Not ``running``: no buffer of it was taken. Raises CannotResume, GuestError, NeedsMessages.
        """
        if not running:
            self._bound = self._new_ring(self.areas())
            return 0
        bound = super()._new_ring(self.areas())
        ring = bound.ring
        assert isinstance(ring, JournaledSplitRing | JournaledPackedRing)
        if not bound.bind():
            raise CannotResume(f"the memory of queue {self.index} is not mapped ({bound.lacks})")
        if bound.by_message:
            raise CannotResume(f"queue {self.index} lies in memory without a file descriptor (see share=on)")
        ring.journal = self._journal
        ring.recover()
        self._bound = bound
        return len(ring.again)

    def interrupt_again(self) -> None:
        """What was shown last may not have been followed by its interrupt; one too many does no harm."""
        if self._bound is not None:
            self._interrupt()
