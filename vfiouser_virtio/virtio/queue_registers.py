"""Queue registers before it is enabled (virtio 1.4, 2.6 and 4.1.4.3): size and addresses."""

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE
from vfiouser_virtio.vring import Area, RingFeatures, ring_areas


class QueueRegisters:
    """Registers of one queue. ``max_size`` is what its device offers, 1 to 32768 entries.

    The attributes are for reading: `configure` and `negotiate` change them.
    """

    def __init__(self, index: int, max_size: int) -> None:
        if not 0 < max_size <= MAX_QUEUE_SIZE:
            raise ValueError(f"queue {index}: max_size {max_size} is not 1 to {MAX_QUEUE_SIZE}")
        self.index = index
        self._max_size = max_size
        self.features = RingFeatures()
        """What was negotiated for the rings."""
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        """Guest addresses of the three parts: descriptors, the driver's area, the device's."""
        self.enabled = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.index} size {self.size}{' enabled' if self.enabled else ''}>"

    @property
    def max_size(self) -> int:
        """The largest size that the driver may choose: until RING_PACKED is negotiated a power of two (CC8)."""
        size = self._max_size
        return size if self.features.packed else 1 << size.bit_length() - 1

    def allows(self, size: int) -> bool:
        """Whether the driver may choose this size: a split queue's is a power of two."""
        return 0 < size <= self.max_size and (self.features.packed or not size & (size - 1))

    def configure(
        self,
        *,
        size: int | None = None,
        desc: int | None = None,
        driver: int | None = None,
        device: int | None = None,
    ) -> None:
        """The driver writes these registers; ``size`` is one that the queue `allows`."""
        self.size = self.size if size is None else size
        self.desc = self.desc if desc is None else desc
        self.driver = self.driver if driver is None else driver
        self.device = self.device if device is None else device

    def negotiate(self, features: RingFeatures) -> None:
        """These features are what the rings have, and so what `allows` says."""
        untouched = self.size == self.max_size
        self.features = features
        if untouched or not self.allows(self.size):
            self.size = self.max_size

    def areas(self) -> list[Area]:
        """Where the ring's parts are. Raises GuestError for one that is not aligned (2.7, 2.8)."""
        areas = ring_areas(self.size, self.features, self.desc, self.driver, self.device)
        for what, area in zip(("desc", "driver", "device"), areas, strict=True):
            if area.address % area.align:
                raise GuestError(
                    f"queue {self.index}: queue_{what} {area.address:#x} is not aligned to {area.align} bytes"
                )
        return areas

    def clear(self) -> None:
        """Back to the default values (2.6.1)."""
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        self.enabled = False
