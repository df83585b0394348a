"""Watch of accesses to the common configuration: which fields, and how wide (virtio 1.4, 4.1.3.1 and 4.1.4.3)."""

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.watch import Watches
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS

WIDTH = must(
    "common/width",
    "4.1.3.1 PCI Device Layout",
    "Fields of 8, 16 and 32 bits are accessed as a whole, those of 64 bits in halves of 32, all aligned.",
    "offset and width of each access to the common configuration",
)
READ_ONLY = must(
    "common/read-only",
    "4.1.4.3.2 Common configuration structure layout",
    "device_feature, num_queues, config_generation, queue_notify_off and queue_notif_config_data are not written.",
    "writes to them",
)
_READ_ONLY = ("device_feature", "num_queues", "config_generation", "queue_notify_off", "queue_notif_config_data")


class CommonCfgWatch:
    """Watch that tells others of fields: it cuts accesses into them."""

    def __init__(self, watches: Watches, findings: Findings) -> None:
        self._watches = watches
        self._findings = findings

    def read(self, offset: int, data: bytes) -> None:
        """The driver has read ``data``."""
        self._check_width("read", offset, len(data))
        for name, value in _fields(offset, data):
            self._watches.field_read(name, value)

    def write(self, offset: int, data: bytes) -> None:
        """The driver is about to write ``data``."""
        self._check_width("wrote", offset, len(data))
        for name, value in _fields(offset, data):
            if name in _READ_ONLY:
                self._findings.broke(READ_ONLY, f"wrote {name} {value:#x}")
            self._watches.field_written(name, value)

    def _check_width(self, did: str, offset: int, count: int) -> None:
        for name, (at, size) in COMMON_CFG_OFFSETS.items():
            if at < offset + count and offset < at + size:
                right = count == 4 and offset in (at, at + 4) if size == 8 else (offset, count) == (at, size)
                if not right:
                    self._findings.broke(WIDTH, f"{did} {count} bytes at {offset:#x}; {name} has {size} at {at:#x}")
                    return


def _fields(offset: int, data: bytes) -> list[tuple[str, int]]:
    """Fields that an access covers, and halves of 64-bit ones, with their values."""
    found = []
    end = offset + len(data)
    for name, (at, size) in COMMON_CFG_OFFSETS.items():
        parts = [(at, size)] if size != 8 or (offset <= at and at + 8 <= end) else [(at, 4), (at + 4, 4)]
        for start, length in parts:
            if offset <= start and start + length <= end:
                found.append((name, int.from_bytes(data[start - offset :][:length], "little")))
    return found
