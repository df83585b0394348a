"""MSI-X vectors as eventfds (PCI Local Bus 3.0 §6.8.2), with the table and the pending bits in a BAR of their own.

::

    0x000              table, 16 bytes per vector     kept for clients that forward it
    max(0x800, 2ⁿ)     pending bit array, read-only   2ⁿ is the table's size rounded up to a power of two
    twice that         end of the BAR: 4 KiB for up to 128 vectors, 64 KiB for 2048

QEMU owns the table: neither accesses to it nor mask bits ever get here, and a vector masked by the guest just has no
eventfd, or one that QEMU holds back. So a vector counts as masked by the table only once a client has written its
control word. Message control and reads of the pending bits do get here.
"""

from collections.abc import Iterable, Sequence

from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.pci.bars import Bar
from vfiouser_virtio.pci.message_vectors import MessageVectors
from vfiouser_virtio.pci.single_irq import NO_FD
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import MSIX_ENTRY, MSIX_ENTRY_CTRL_MASKBIT, MSIX_ENTRY_SIZE, MSIX_MAX_VECTORS
from vfiouser_virtio.vfio_device import Buffer

_SMALLEST_PBA_OFFSET = 0x800  # where QEMU's own virtio-pci has it
_VECTOR_CTRL, _ = offsets(MSIX_ENTRY)["vector_ctrl"]
# Messages are 4-byte aligned; of the control word only the mask bit exists.
_ENTRY_WRITABLE = MSIX_ENTRY.build(
    {"lower_addr": 0xFFFF_FFFC, "upper_addr": 0xFFFF_FFFF, "data": 0xFFFF_FFFF, "vector_ctrl": MSIX_ENTRY_CTRL_MASKBIT}
)
_ENTRY_POWER_ON = MSIX_ENTRY.build(
    {"lower_addr": 0, "upper_addr": 0, "data": 0, "vector_ctrl": MSIX_ENTRY_CTRL_MASKBIT}
)


class Msix(MessageVectors):
    """``count`` vectors, 1 to 2048. A vector that cannot fire becomes pending and fires when it can."""

    table_offset = 0

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MSIX_MAX_VECTORS:
            raise ValueError(f"MSI-X has 1 to {MSIX_MAX_VECTORS} vectors, not {count}")
        super().__init__(count)
        self.enabled = False
        self._table_size = count * MSIX_ENTRY_SIZE
        self.pba_offset = max(_SMALLEST_PBA_OFFSET, 1 << (self._table_size - 1).bit_length())
        self._image = bytearray(2 * self.pba_offset)  # what the BAR reads as
        self._masked = bytearray(count)
        self._mask_all = False
        self.reset()

    def bar(self) -> Bar:
        """The BAR that holds table and pending bits."""
        return Bar(len(self._image), self._read, self._write)

    def fire(self, vector: int) -> None:
        """Signal a vector now, or leave it pending while it is masked or has no eventfd. ValueError: no such vector."""
        if not 0 <= vector < self.count:
            raise ValueError(f"MSI-X vector {vector} of {self.count}")
        fd = self._fds[vector]
        if self._mask_all or self._masked[vector]:
            self._image[self.pba_offset + (vector >> 3)] |= 1 << (vector & 7)
        elif fd != NO_FD:
            signal(fd)
        elif self.trigger_elsewhere is None or not self.trigger_elsewhere(vector):
            self._image[self.pba_offset + (vector >> 3)] |= 1 << (vector & 7)

    def retry(self) -> None:
        """What an eventfd was missing for may have one now, elsewhere."""
        self._deliver(range(self.count))

    def pending(self, vector: int) -> bool:
        """Whether the vector waits for its mask or its eventfd."""
        return bool(self._image[self.pba_offset + (vector >> 3)] & 1 << (vector & 7))

    def set_control(self, *, enable: bool, mask_all: bool) -> None:
        """Message control was written. Disabling drops what is pending, unmasking delivers it."""
        if self.enabled and not enable:
            self._clear_pending()
        self.enabled = enable
        self._mask_all = mask_all
        if not mask_all:
            self._deliver(range(self.count))

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """SET_IRQS with eventfds for ``start`` on. A live vector changes over without losing an event."""
        super().assign(start, fds)
        self._deliver(range(start, start + len(fds)))

    def disable(self) -> None:
        """SET_IRQS with count 0: no vector has an eventfd, nothing is pending."""
        super().disable()
        self._clear_pending()

    def state(self) -> bytes:
        """The table, and which vectors it masks; empty while nothing of it was written."""
        table = bytes(self._image[: self._table_size])
        return b"" if table == _ENTRY_POWER_ON * self.count else table + self._masked

    def restore(self, state: bytes) -> None:
        """What `state` has returned; nothing is pending. Raises ValueError for that of a table of another size."""
        state = state or _ENTRY_POWER_ON * self.count + bytes(self.count)
        if len(state) != self._table_size + self.count:
            raise ValueError(f"{len(state)} bytes of MSI-X with {self.count} vectors")
        self._image[: self._table_size] = state[: self._table_size]
        self._masked[:] = state[self._table_size :]
        self._clear_pending()

    def reset(self) -> None:
        """Back to power-on; the eventfds stay, because a client does not send them again."""
        self.enabled = self._mask_all = False
        self._masked[:] = bytes(self.count)
        self._image[: self._table_size] = _ENTRY_POWER_ON * self.count
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._image[self.pba_offset :] = bytes(len(self._image) - self.pba_offset)

    def _deliver(self, vectors: Iterable[int]) -> None:
        for vector in vectors:
            if self.pending(vector):
                self._image[self.pba_offset + (vector >> 3)] &= ~(1 << (vector & 7))
                self.fire(vector)  # pending again if it still cannot

    def _read(self, offset: int, count: int) -> bytes:
        return bytes(self._image[offset : offset + count])

    def _write(self, offset: int, data: Buffer) -> None:
        end = min(offset + len(data), self._table_size)  # pending bits and gaps are read-only
        if offset >= end:
            return
        # A client may write all of 2048 vectors in one message, for which all other devices wait: the rest of it is
        # done at once, and nothing here takes longer for a function with more vectors.
        writable = (_ENTRY_WRITABLE * (end // MSIX_ENTRY_SIZE + 1))[offset:end]
        bits = int.from_bytes(data[: end - offset], "little") & int.from_bytes(writable, "little")
        self._image[offset:end] = bits.to_bytes(end - offset, "little")
        for at in range(offset + (_VECTOR_CTRL - offset) % MSIX_ENTRY_SIZE, end, MSIX_ENTRY_SIZE):
            vector = at // MSIX_ENTRY_SIZE
            self._masked[vector] = self._image[at]
            self._deliver((vector,))
