"""INTx over vfio (PCI Local Bus 3.0 §2.2.6): a level-triggered interrupt on an eventfd, which has only edges.

::

    line = level and not blocked              level: what the function wants; blocked: INTX_DISABLE, or MSI-X is on
    line up, not masked  ──▶ signal, masked   (vfio's AUTOMASKED: the client masks the interrupt when it fires)
    unmasked             ──▶ signal again if the line is still up
    line down, masked    ──▶ the signal is taken back, as long as the client has not read it: unmasked

The client unmasks with SET_IRQS, or through the resample eventfd that KVM signals at the guest's end of interrupt. QEMU
unmasks at the guest's next access to any BAR. A new eventfd and SET_IRQS' disable unmask too: the interrupt that the
old one had announced is forgotten.

A signal that is read when the line is down again asserts the guest's interrupt with nothing behind it, and QEMU lets go
of it only at the next access of a BAR. There may be none: the driver has gone, or looks at config space (uio) or at its
queues (nvme) alone. Then the interrupt comes for ever, and Linux turns it off for all that share it: "nobody cared".
"""

import os
from collections.abc import Callable, Sequence

from vfiouser_virtio.eventfds import CAN_TAKE, signal, take
from vfiouser_virtio.pci.single_irq import NO_FD, SingleIrq
from vfiouser_virtio.vfio_device import Trigger


class Intx(SingleIrq):
    """Interrupt of index INTX. ``pin``: 1 is INTA#, 0 means that the function has none."""

    def __init__(self, pin: int, on_resample_fd: Callable[[int | None], None]) -> None:
        if not 0 <= pin <= 4:
            raise ValueError(f"interrupt pin {pin} is none of 0 (no INTx) and 1 to 4 (INTA# to INTD#)")
        super().__init__()
        self.count = 1 if pin else 0
        self.level = False
        self.resample_fd: int | None = None
        self.trigger_elsewhere: Trigger | None = None
        """Signals the interrupt where an engine keeps the eventfd itself."""
        self._blocked = False
        self._signalled = self._masked = False  # since it was unmasked: by us, by the client
        self._on_resample_fd = on_resample_fd

    @property
    def masked(self) -> bool:
        """Whether the line's going up is not signalled: it was already, or the client has masked it."""
        return self._signalled or self._masked

    def set_level(self, level: bool) -> None:
        """What the function wants of the line; stays until told otherwise."""
        self.level = level
        self._update()

    def set_blocked(self, blocked: bool) -> None:
        """Whether something keeps the line down: INTX_DISABLE, or MSI-X, which replaces it."""
        self._blocked = blocked
        if blocked and self.trigger_elsewhere is not None:
            # The client takes its eventfd away then, which unmasks; but that is not told.
            self._unmask()
        self._update()

    def mask(self) -> None:
        """SET_IRQS ACTION_MASK: do not signal until unmasked."""
        self._masked = True

    def unmask(self) -> None:
        """SET_IRQS ACTION_UNMASK: signal again if the line is up."""
        self._unmask()
        self._update()

    def retry(self) -> None:
        """An eventfd that was missing may be there now, elsewhere."""
        self._update()

    def set_resample_fd(self, fd: int | None) -> None:
        """SET_IRQS ACTION_UNMASK with an eventfd, or without one. The old one is closed after its waiter was told."""
        old, self.resample_fd = self.resample_fd, fd
        if old is not None or fd is not None:
            self._on_resample_fd(fd)
        if old is not None:
            os.close(old)

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """SET_IRQS with an eventfd; closes the one before and forgets what it was told."""
        super().assign(start, fds)
        if fds:
            self.unmask()

    def disable(self) -> None:
        """SET_IRQS with count 0: neither eventfd nor resample eventfd, unmasked."""
        super().disable()
        self.set_resample_fd(None)
        self._unmask()

    def reset(self) -> None:
        """Line down and unmasked; the eventfds stay, because a client does not send them again."""
        self.level = False
        self._update()
        self._unmask()
        self._blocked = False

    def _unmask(self) -> None:
        self._signalled = self._masked = False

    def _update(self) -> None:
        if not self.level or self._blocked:
            if self._signalled and self._take_back():
                self._signalled = False
        elif self.masked:
            pass
        elif self._fd != NO_FD:
            self._signalled = True
            signal(self._fd)
        elif self.trigger_elsewhere is not None:
            self._signalled = self.trigger_elsewhere(0)

    def _take_back(self) -> bool:
        """Whether the client had not read the signal, and now cannot. One whose read would wait for it keeps it."""
        return self._fd != NO_FD and CAN_TAKE and not os.get_blocking(self._fd) and take(self._fd)
