"""Registers of struct virtio_pci_common_cfg (virtio 1.4, 4.1.4.3), over the state that `DeviceCore` keeps.

A driver uses each field's natural width, and halves of the 64-bit ones (4.1.3.1). Whatever else it tries has a defined
answer: any read returns the bytes that the fields hold; a write changes the fields that it covers wholly, and no other.
"""

from collections.abc import Callable

from vfiouser_virtio.protocols.codec import NUMBERS, codec
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG, COMMON_CFG_OFFSETS, COMMON_CFG_SIZE, NO_VECTOR
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.virtio import DeviceCore, Virtqueue

_CODEC = codec(COMMON_CFG)
_NAMES = {offset: (name, size) for name, (offset, size) in COMMON_CFG_OFFSETS.items()}
# Where a whole field is accessed, which nearly all accesses are.
_FIELDS = {(offset, size): name for name, (offset, size) in COMMON_CFG_OFFSETS.items()}
_UNPACK = {size: number.unpack for size, number in NUMBERS.items()}
_GENERATION_OFFSET = COMMON_CFG_OFFSETS["config_generation"][0]


class CommonCfg:
    """Register reads and writes for one device.

    ``vectors`` is the MSI-X table's size; ``on_reset`` is called when the driver resets the device by its status.
    """

    def __init__(self, core: DeviceCore, vectors: int, on_reset: Callable[[], None]) -> None:
        self.core = core
        self.vectors = vectors
        self._on_reset = on_reset
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(core.queues)
        self._device_feature_select = self._driver_feature_select = self._queue_select = 0
        self._queues_resetting: set[int] = set()
        self._getters: dict[str, Callable[[], int]] = {
            "device_feature_select": lambda: self._device_feature_select,
            "device_feature": lambda: core.read_device_features(self._device_feature_select),
            "driver_feature_select": lambda: self._driver_feature_select,
            "driver_feature": lambda: core.read_driver_features(self._driver_feature_select),
            "config_msix_vector": lambda: self.config_vector,
            "num_queues": lambda: len(core.queues),
            "device_status": lambda: core.status,
            "config_generation": core.read_generation,
            "queue_select": lambda: self._queue_select,
            "queue_size": lambda: queue.size if (queue := self._queue) else 0,
            "queue_msix_vector": lambda: self.queue_vectors[queue.index] if (queue := self._queue) else NO_VECTOR,
            "queue_enable": lambda: int(queue.enabled) if (queue := self._queue) else 0,
            "queue_notify_off": lambda: queue.index if (queue := self._queue) else 0,
            "queue_desc": lambda: queue.desc if (queue := self._queue) else 0,
            "queue_driver": lambda: queue.driver if (queue := self._queue) else 0,
            "queue_device": lambda: queue.device if (queue := self._queue) else 0,
            "queue_notif_config_data": self._notif_config_data,
            "queue_reset": lambda: int(self._queue_select in self._queues_resetting),
            # ADMIN_VQ is not offered.
            "admin_queue_index": lambda: 0,
            "admin_queue_num": lambda: 0,
        }
        self._setters: dict[str, Callable[[int], None]] = {
            "device_feature_select": self._set_device_feature_select,
            "driver_feature_select": self._set_driver_feature_select,
            "driver_feature": lambda value: core.write_driver_features(self._driver_feature_select, value),
            "config_msix_vector": self._set_config_vector,
            "device_status": self._set_status,
            "queue_select": self._set_queue_select,
            "queue_size": self._set_queue_size,
            "queue_msix_vector": self._set_queue_vector,
            "queue_enable": self._set_queue_enable,
            "queue_desc": self._set_queue_desc,
            "queue_driver": self._set_queue_driver,
            "queue_device": self._set_queue_device,
            "queue_reset": self._set_queue_reset,
        }
        self._read_exact = {place: self._getters[name] for place, name in _FIELDS.items()}
        self._write_exact = {
            place: (self._setters[name], _UNPACK[place[1]]) for place, name in _FIELDS.items() if name in self._setters
        }

    def reset(self) -> None:
        """What the driver has selected and mapped is forgotten (MX2: all vectors unmapped)."""
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.queue_vectors)
        self._device_feature_select = self._driver_feature_select = self._queue_select = 0
        self._queues_resetting.clear()

    def state(self) -> dict[str, int | list[int]]:
        """What the driver has selected and mapped, as plain data."""
        return {
            "selected": [self._device_feature_select, self._driver_feature_select, self._queue_select],
            "config_vector": self.config_vector,
            "queue_vectors": list(self.queue_vectors),
        }

    def restore(self, *, selected: list[int], config_vector: int, queue_vectors: list[int]) -> None:
        """What `state` has returned. Raises ValueError for another number of queues."""
        if len(queue_vectors) != len(self.queue_vectors):
            raise ValueError(f"vectors of {len(queue_vectors)} queues instead of {len(self.queue_vectors)}")
        self._device_feature_select, self._driver_feature_select, self._queue_select = selected
        self._set_config_vector(config_vector)
        self.queue_vectors = [value if value < self.vectors else NO_VECTOR for value in queue_vectors]

    # ---- accesses ------------------------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``; beyond the 64 bytes of the structure there are zeros."""
        getter = self._read_exact.get((offset, count))
        if getter is not None:
            return getter().to_bytes(count, "little")
        # Only a read that covers the generation may count as the driver's having seen it.
        sees_generation = offset <= _GENERATION_OFFSET < offset + count
        values = [
            get() if name != "config_generation" or sees_generation else 0
            for name, get in ((name, self._getters[name]) for name in COMMON_CFG_OFFSETS)
        ]
        return _CODEC.pack(*values)[offset : offset + count].ljust(count, b"\0")

    def write(self, offset: int, data: Buffer) -> None:
        """Change the fields, or halves of 64-bit ones, that the write covers wholly."""
        exact = self._write_exact.get((offset, len(data)))
        if exact is not None:
            setter, unpack = exact
            setter(unpack(data)[0])
            return
        position, end = offset, offset + len(data)
        written = False
        while position < end and position < COMMON_CFG_SIZE:
            field = _NAMES.get(position)
            if field is not None and position + field[1] <= end:
                name, size = field
                self._set(name, int.from_bytes(data[position - offset :][:size], "little"))
            elif (half := self._half(position)) is not None and position + 4 <= end:
                name, shift = half
                size = 4
                value = int.from_bytes(data[position - offset :][:4], "little")
                self._set(name, self._getters[name]() & ~(0xFFFF_FFFF << shift) | value << shift)
            else:
                position += 1
                continue
            position += size
            written = True
        if not written:
            self.core.complain(
                "width", f"wrote {len(data)} bytes at {offset:#x} of the common configuration: no whole field"
            )

    @staticmethod
    def _half(position: int) -> tuple[str, int] | None:
        for start, shift in ((position, 0), (position - 4, 32)):
            field = _NAMES.get(start)
            if field is not None and field[1] == 8:
                return field[0], shift
        return None

    def _set(self, name: str, value: int) -> None:
        setter = self._setters.get(name)
        if setter is not None:  # the others are read-only for the driver
            setter(value)

    # ---- fields --------------------------------------------------------------------------------------------------

    @property
    def _queue(self) -> Virtqueue | None:
        """The selected queue; None for one that does not exist: its registers read as zeros."""
        queues = self.core.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _notif_config_data(self) -> int:
        queue = self._queue
        if queue is None or not self.core.device.negotiated(Feature.NOTIF_CONFIG_DATA):
            return 0  # the field exists only if that was negotiated
        return self.core.notif_config_data(queue.index)

    def _set_device_feature_select(self, value: int) -> None:
        self._device_feature_select = value

    def _set_driver_feature_select(self, value: int) -> None:
        self._driver_feature_select = value

    def _set_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _set_status(self, value: int) -> None:
        self.core.write_status(value)
        if value == 0:
            self.reset()
            self._on_reset()

    def _set_config_vector(self, value: int) -> None:
        # Reading back NO_VECTOR tells the driver that there is no such vector (4.1.5.1.2.1).
        self.config_vector = value if value < self.vectors else NO_VECTOR

    def _set_queue_vector(self, value: int) -> None:
        queue = self._queue
        if queue is not None:
            self.queue_vectors[queue.index] = value if value < self.vectors else NO_VECTOR

    def _set_queue_size(self, value: int) -> None:
        queue = self._configurable("queue_size", value)
        if queue is None:
            return
        if not queue.allows(value):
            kind = "size" if queue.features.packed else "power of two"
            self.core.complain("size", f"wrote queue_size {value:#x}: no {kind} up to {queue.max_size:#x}; ignored")
            return
        queue.configure(size=value)

    def _set_queue_desc(self, value: int) -> None:
        if (queue := self._configurable("queue_desc", value)) is not None:
            queue.configure(desc=value)

    def _set_queue_driver(self, value: int) -> None:
        if (queue := self._configurable("queue_driver", value)) is not None:
            queue.configure(driver=value)

    def _set_queue_device(self, value: int) -> None:
        if (queue := self._configurable("queue_device", value)) is not None:
            queue.configure(device=value)

    def _configurable(self, register: str, value: int) -> Virtqueue | None:
        queue = self._queue
        if queue is not None and queue.enabled:
            self.core.complain(
                register, f"wrote {register} {value:#x} of queue {queue.index}, which is enabled; ignored"
            )
            return None
        return queue

    def _set_queue_enable(self, value: int) -> None:
        queue = self._queue
        # "The driver MUST NOT write a 0": SPDK does so after its reset, when there is nothing to disable.
        if queue is not None and value == 1 and queue.index not in self._queues_resetting:
            self.core.enable_queue(queue.index)

    def _set_queue_reset(self, value: int) -> None:
        queue = self._queue
        if queue is None or value != 1 or not self.core.driver_features & Feature.RING_RESET.mask:
            return
        index = queue.index
        self.queue_vectors[index] = NO_VECTOR  # part of the state that goes; the driver sets all of it anew (2.6.1.2)
        hold = self.core.reset_queue(index)
        if hold is not None:
            self._queues_resetting.add(index)
            hold.when_done(lambda: self._queues_resetting.discard(index))
