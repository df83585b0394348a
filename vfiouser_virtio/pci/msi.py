"""MSI: 1 to 32 vectors as eventfds (PCI Local Bus 3.0 §6.8.1), with 64-bit addresses and a mask bit per vector.

::

    0x00  id 5, next     0x02  message control: ENABLE, vectors offered (QMASK), vectors granted (QSIZE)
    0x04  message address, 64 bits     0x0c  message data, 16 bits
    0x10  mask bits, read-write        0x14  pending bits, read-only

Address and data are kept and not used: the client knows them, and gives an eventfd for each vector. QEMU emulates the
whole capability and forwards what is written to it: so a vector that its guest masks is held back here, as the
specification has it, and the guest reads QEMU's pending bits, which stay 0.
"""

from collections.abc import Iterable, Sequence

from vfiouser_virtio.pci.message_vectors import MessageVectors
from vfiouser_virtio.protocols.pci import MSI_MAX_VECTORS


class Msi(MessageVectors):
    """``count`` vectors: 1, 2, 4, 8, 16 or 32. One that cannot be sent becomes pending, and is sent when it can."""

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MSI_MAX_VECTORS or count.bit_count() != 1:
            raise ValueError(f"MSI has 1, 2, 4, 8, 16 or {MSI_MAX_VECTORS} vectors, not {count}")
        super().__init__(count)
        self.enabled = False
        self.granted = 1
        """Vectors that the driver has allowed, at most ``count``."""
        self.pending_bits = 0
        """Those that wait for their mask or their eventfd, as the register has them."""
        self._mask = 0

    def fire(self, vector: int) -> None:
        """Send a vector now, or leave it pending while it is masked or has no eventfd. ValueError: no such vector.

        One beyond those `granted` is sent as the one with the same low bits: a message's data has no room for more
        (§6.8.1.3). Does not look at MSI Enable.
        """
        if not 0 <= vector < self.count:
            raise ValueError(f"MSI vector {vector} of {self.count}")
        vector &= self.granted - 1
        if self._mask >> vector & 1 or not self._sent(vector):
            self.pending_bits |= 1 << vector

    def set_registers(self, *, enable: bool, granted: int, mask: int) -> None:
        """Message control or the mask bits were written. Disabling drops what is pending, unmasking sends it.

        ``granted`` is cut to what there is: a driver must not grant more than was asked for, but can.
        """
        self.granted = min(granted, self.count)
        self._mask = mask
        self.pending_bits &= (1 << self.granted) - 1 if enable else 0
        self.enabled = enable
        self._deliver(range(self.granted))

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """SET_IRQS with eventfds for ``start`` on. A live vector changes over without losing an event."""
        super().assign(start, fds)
        self._deliver(range(start, start + len(fds)))

    def disable(self) -> None:
        """SET_IRQS with count 0: no vector has an eventfd, nothing is pending."""
        super().disable()
        self.pending_bits = 0

    def retry(self) -> None:
        """What an eventfd was missing for may have one now, elsewhere."""
        self._deliver(range(self.count))

    def reset(self) -> None:
        """Back to power-on; the eventfds stay, because a client does not send them again."""
        self.set_registers(enable=False, granted=1, mask=0)

    def _deliver(self, vectors: Iterable[int]) -> None:
        due = self.pending_bits & ~self._mask
        for vector in vectors if due else ():
            if due >> vector & 1 and self._sent(vector):
                self.pending_bits &= ~(1 << vector)
