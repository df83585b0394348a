"""Eventfds of message-signalled interrupts, one for each vector: what MSI and MSI-X have in common (SET_IRQS)."""

import os
from collections.abc import Iterable, Sequence

from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.pci.single_irq import NO_FD
from vfiouser_virtio.vfio_device import Trigger


class MessageVectors:
    """``count`` vectors; subclasses know which of them are masked and which are pending."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fds = [NO_FD] * count
        self.trigger_elsewhere: Trigger | None = None
        """Signals a vector that has no eventfd here, where an engine keeps them itself."""

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """SET_IRQS with eventfds for ``start`` on; closes those before."""
        for vector, fd in enumerate(fds, start):
            old, self._fds[vector] = self._fds[vector], fd
            if old != NO_FD:
                os.close(old)

    def deassign(self, start: int, count: int) -> None:
        """SET_IRQS without eventfds: what the vectors are asked for from now on stays pending."""
        for vector in range(start, start + count):
            old, self._fds[vector] = self._fds[vector], NO_FD
            if old != NO_FD:
                os.close(old)

    def disable(self) -> None:
        """SET_IRQS with count 0: no vector has an eventfd."""
        self.deassign(0, self.count)

    def trigger(self, vectors: Iterable[int]) -> None:
        """SET_IRQS' loopback test: signal these vectors' eventfds, masked or not."""
        for vector in vectors:
            if self._fds[vector] != NO_FD:
                signal(self._fds[vector])

    def _sent(self, vector: int) -> bool:
        """Signal a vector that is not masked; False: there is no eventfd for it."""
        fd = self._fds[vector]
        if fd != NO_FD:
            signal(fd)
            return True
        return self.trigger_elsewhere is not None and self.trigger_elsewhere(vector)
