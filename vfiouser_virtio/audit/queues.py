"""Watch of queue registers: set-up, enabling and reset of virtqueues (virtio 1.4, 2.6.1, 2.7.1, 2.8.11, 4.1.4.3)."""

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.vring import RingFeatures, ring_areas

_COMMON = "4.1.4.3.2 Common configuration structure layout"

SIZE_ZERO = must(
    "queue/size-zero", _COMMON, "With RING_PACKED, 0 is never written to queue_size.", "writes of queue_size"
)
SIZE_POWER = must(
    "queue/size-power-of-two",
    _COMMON,
    "Without RING_PACKED, only powers of two are written to queue_size.",
    "writes of queue_size",
)
FIELDS_FIRST = must(
    "queue/fields-first",
    _COMMON,
    "The addresses of a queue are written before it is enabled.",
    "queue_enable with queue_desc, queue_driver or queue_device not written since the device's, or the queue's, reset",
)
FIELDS_LATE = must(
    "queue/fields-late",
    _COMMON,
    "Size and addresses of a queue are not changed once it is enabled.",
    "writes of queue_size, queue_desc, queue_driver or queue_device of a queue that is enabled",
)
ENABLE_ZERO = must("queue/enable-zero", _COMMON, "0 is never written to queue_enable.", "writes of queue_enable")
ENABLE_LATE = must(
    "queue/enable-late",
    "3.1.1 Device Initialization",
    "Queues are set up before DRIVER_OK; later only those that were reset one by one.",
    "queue_enable in status DRIVER_OK, of a queue that was not reset with queue_reset",
)
SPLIT_ALIGNMENT = must(
    "queue/split-alignment",
    "2.7.1 Split Virtqueues",
    "The parts of a split queue are aligned to 16, 2 and 4 bytes.",
    "queue_desc, queue_driver and queue_device when the queue is enabled",
)
PACKED_ALIGNMENT = must(
    "queue/packed-alignment",
    "2.8.11 Packed Virtqueues",
    "The parts of a packed queue are aligned to 16, 4 and 4 bytes.",
    "queue_desc, queue_driver and queue_device when the queue is enabled",
)
USED_FLAGS = must(
    "queue/used-flags",
    "2.7.10.1 Available Buffer Notification Suppression",
    "flags of the used ring are 0 when the driver hands the ring over.",
    "flags of the used ring when the queue is enabled",
)
RESET_NEGOTIATED = must(
    "queue/reset-negotiated",
    "2.6.1 Virtqueue Reset (prose)",
    "A queue is reset by itself only where RING_RESET was negotiated.",
    "queue_reset written without that feature",
)
RESET_VERIFY = must(
    "queue/reset-verify",
    "2.6.1.1.2 Virtqueue Reset, 4.1.4.3.2",
    "After a queue was reset the driver reads queue_reset until it is 0, before it uses the queue again.",
    "a field of the queue written after queue_reset with no read of 0 in between",
)

_ADDRESSES = ("queue_desc", "queue_driver", "queue_device")
_FIELDS = ("queue_size", *_ADDRESSES)


class QueueWatch(Watch):
    """Watch of what is written of each queue."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._select = 0
        self._written: dict[int, set[str]] = {}
        self._resetting: set[int] = set()
        self._was_reset: set[int] = set()

    def reset(self) -> None:
        """The registers have their first values."""
        self._select = 0
        self._written = {}
        self._resetting.clear()
        self._was_reset.clear()

    def field_read(self, name: str, value: int) -> None:
        """A read of 0 ends a queue's reset."""
        if name == "queue_reset" and not value:
            self._resetting.discard(self._select)

    def field_written(self, name: str, value: int) -> None:
        """Queues that do not exist have no registers."""
        if name == "queue_select":
            self._select = value
        elif name == "device_status" and not value:
            self.reset()
        elif name.startswith("queue_") and self._select < len(self.core.queues):
            queue = self.core.queues[self._select]
            if queue.index in self._resetting and name != "queue_reset":
                self._resetting.discard(queue.index)
                self.broke(RESET_VERIFY, f"queue {queue.index}: wrote {name} with no read of queue_reset as 0")
            if name in _FIELDS:
                self._field_written(queue, name, value)
            elif name == "queue_enable":
                self._enabled(queue, value)
            elif name == "queue_reset" and value == 1:
                self._reset(queue)

    def _field_written(self, queue: Virtqueue, name: str, value: int) -> None:
        self._written.setdefault(queue.index, set()).add(name)
        if queue.enabled:
            self.broke(FIELDS_LATE, f"queue {queue.index}: wrote {name} {value:#x}, and it is enabled")
        if name == "queue_size":
            packed = self.core.driver_features & Feature.RING_PACKED.mask
            if packed and not value:
                self.broke(SIZE_ZERO, f"queue {queue.index}: wrote queue_size 0")
            elif not packed and value.bit_count() != 1:
                self.broke(SIZE_POWER, f"queue {queue.index}: wrote queue_size {value:#x}")

    def _enabled(self, queue: Virtqueue, value: int) -> None:
        where = f"queue {queue.index}"
        if value != 1:
            self.broke(ENABLE_ZERO, f"{where}: wrote queue_enable {value:#x}")
            return
        if queue.enabled or not self.core.status & DeviceStatus.FEATURES_OK:
            return
        missing = [name for name in _ADDRESSES if name not in self._written.get(queue.index, ())]
        if missing:
            self.broke(FIELDS_FIRST, f"{where}: enabled with no write of {', '.join(missing)}")
        if self.core.status & DeviceStatus.DRIVER_OK and queue.index not in self._was_reset:
            self.broke(ENABLE_LATE, f"{where}: enabled after DRIVER_OK")
        features = RingFeatures.of(self.core.driver_features)
        areas = ring_areas(queue.size, features, queue.desc, queue.driver, queue.device)
        for name, area in zip(_ADDRESSES, areas, strict=True):
            if area.address % area.align:
                rule = PACKED_ALIGNMENT if features.packed else SPLIT_ALIGNMENT
                self.broke(rule, f"{where}: {name} {area.address:#x} is no multiple of {area.align}")
        if not features.packed and (flags := self._peek(queue.device)):
            self.broke(USED_FLAGS, f"{where}: flags of its used ring are {flags:#x}")

    def _peek(self, address: int) -> int:
        """16 bits of guest memory; 0 where they cannot be had at once."""
        try:
            return int.from_bytes(b"".join(self.core.memory.readable(address, 2)), "little")
        except (Unmapped, NeedsMessages):
            return 0

    def _reset(self, queue: Virtqueue) -> None:
        if not self.core.driver_features & Feature.RING_RESET.mask:
            self.broke(RESET_NEGOTIATED, f"queue {queue.index}: wrote queue_reset 1 without RING_RESET")
            return
        self._resetting.add(queue.index)
        self._was_reset.add(queue.index)
        self._written.pop(queue.index, None)
