"""Interrupt of an index that has just one, on an eventfd: INTx, and those that the function never raises, ERR and REQ.

ERR reports an error that the guest cannot recover from (QEMU stops the VM), REQ asks for the device back.
A device of ours has neither to say. Count 0 would be true as well, but QEMU prints a warning for it ("Could not enable
error recovery for the device"), and libvfio-user's sample client takes an error reply for the end. linux/vfio.h:
VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX.
"""

import os
from collections.abc import Iterable, Sequence

from vfiouser_virtio.eventfds import signal

NO_FD = -1


class SingleIrq:
    """Interrupt that only SET_IRQS' own loopback test signals; `Intx` does more."""

    count = 1

    def __init__(self) -> None:
        self._fd = NO_FD

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """SET_IRQS with an eventfd; closes the one before. ``start`` is always 0."""
        for fd in fds:
            self.deassign(start, 1)
            self._fd = fd

    def deassign(self, start: int, count: int) -> None:
        """SET_IRQS without an eventfd, for the only interrupt there is."""
        assert start == 0
        if count and self._fd != NO_FD:
            os.close(self._fd)
            self._fd = NO_FD

    def disable(self) -> None:
        """SET_IRQS with count 0: no eventfd."""
        self.deassign(0, 1)

    def trigger(self, vectors: Iterable[int]) -> None:
        """SET_IRQS' loopback test: signal the eventfd, masked or not."""
        for _ in vectors:
            if self._fd != NO_FD:
                signal(self._fd)
