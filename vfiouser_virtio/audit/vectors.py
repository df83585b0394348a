"""Watch of MSI-X vectors and ISR status (virtio 1.4, 4.1.4.5 and 4.1.5.1.2)."""

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR

_VECTORS = "4.1.5.1.2.2 MSI-X Vector Configuration"

RANGE = must(
    "msix/range",
    _VECTORS,
    "No event is mapped to a vector outside of the MSI-X table.",
    "config_msix_vector and queue_msix_vector, and the table's size",
)
VERIFY = must(
    "msix/verify",
    _VECTORS,
    "After an event was mapped to a vector, the field is read to see whether that worked.",
    "DRIVER_OK set while a vector that was written has not been read back",
)
ISR = should(
    "msix/isr",
    "4.1.4.5.2 ISR status capability",
    "With MSI-X enabled, ISR status is not read for a queue's interrupt.",
    "reads of ISR status with MSI-X enabled and DRIVER_OK set",
)

_FIELDS = ("config_msix_vector", "queue_msix_vector")


class VectorWatch(Watch):
    """Watch of vectors that were written and not read."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._select = 0
        self._unread: dict[tuple[str, int], int] = {}

    def reset(self) -> None:
        """No event has a vector."""
        self._select = 0
        self._unread.clear()

    def _key(self, name: str) -> tuple[str, int]:
        return name, self._select if name == "queue_msix_vector" else 0

    def field_read(self, name: str, value: int) -> None:
        """What is read is verified."""
        del value
        if name in _FIELDS:
            self._unread.pop(self._key(name), None)

    def field_written(self, name: str, value: int) -> None:
        """Vectors, and the step after which they are used."""
        if name == "queue_select":
            self._select = value
        elif name == "device_status" and not value:
            self.reset()
        elif name == "device_status" and value & DeviceStatus.DRIVER_OK & ~self.core.status:
            for (field, index), vector in self._unread.items():
                of = f" of queue {index}" if field == "queue_msix_vector" else ""
                self.broke(VERIFY, f"wrote {field}{of} {vector:#x}, and never read it")
            self._unread.clear()
        elif name in _FIELDS and value != NO_VECTOR and (name == _FIELDS[0] or self._select < len(self.core.queues)):
            if value >= self.registers.vectors:
                self.broke(RANGE, f"wrote {name} {value:#x}; the table has {self.registers.vectors:#x} vectors")
            self._unread[self._key(name)] = value
        elif name in _FIELDS:
            self._unread.pop(self._key(name), None)

    def isr_read(self) -> None:
        """Before DRIVER_OK there is no interrupt that it could be for."""
        if self.registers.msix_enabled and self.core.status & DeviceStatus.DRIVER_OK:
            self.broke(ISR, "read ISR status with MSI-X enabled")
