"""Watch of how a driver queries an input device's configuration (virtio 1.4, 5.8.4 and 5.8.5)."""

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio.input import CONFIG

QUERY = must(
    "input/query",
    "5.8.5.1 Device Initialization",
    "select and subsel are both set when the configuration is queried.",
    "reads of size and u: with one of the two written since the last, or not both since the reset",
)

_FIELDS = offsets(CONFIG)
_BOTH = {"select", "subsel"}


def _touched(offset: int, count: int) -> set[str]:
    return {name for name, (at, size) in _FIELDS.items() if at < offset + count and offset < at + size}


class InputQueryWatch(Watch):
    """Watch of select, subsel and what they select: several reads are one query."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._written: set[str] = set()
        self._new: set[str] = set()

    def reset(self) -> None:
        """Nothing is selected."""
        self._written.clear()
        self._new.clear()

    def field_written(self, name: str, value: int) -> None:
        """A reset by the driver."""
        if name == "device_status" and not value:
            self.reset()

    def config_written(self, offset: int, data: bytes) -> None:
        """Half of a query, or more."""
        self._new |= _touched(offset, len(data)) & _BOTH

    def config_read(self, offset: int, count: int) -> None:
        """An answer, or a part of it."""
        read = _touched(offset, count) - _BOTH
        if not read:
            return
        self._written |= self._new
        if len(self._new) == 1 or self._written != _BOTH:
            missing = sorted(_BOTH - (self._new or self._written))
            self.broke(QUERY, f"read {', '.join(sorted(read))} with {' and '.join(missing)} not written before")
        self._new.clear()
