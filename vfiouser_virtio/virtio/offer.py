"""Offer of reserved feature bits (virtio 1.4, 6) and of the queues' size, beside the features of the device type.

One `Offer` is a transport's answer to "what may a driver choose from?"; every switch works on every device. The names
are those of QEMU's device properties where QEMU has one. What a driver does not accept makes no difference to it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE

Poll = Literal["on", "adaptive", "off"]
"""Whether a device looks at its queues without being notified: always, for a bounded time after some work, never."""


# Neither frozen nor with a repr: that is 0.4 ms of each start.
@dataclass(slots=True, kw_only=True, repr=False)
class Offer:
    """Switches of what is offered. Raises ConfigError for a ``queue_size`` that cannot be."""

    packed: Annotated[bool, "RING_PACKED: one ring that both sides write, instead of one ring each"] = False
    event_idx: Annotated[bool, "EVENT_IDX: fewer notifications, as each side says when it wants one"] = True
    indirect_desc: Annotated[bool, "INDIRECT_DESC: a request of many pieces takes one entry of a queue"] = True
    in_order: Annotated[bool, "IN_ORDER: requests end in the order in which they were made"] = False
    queue_reset: Annotated[bool, "RING_RESET: the guest may reset one queue, and enable it anew"] = True
    notification_data: Annotated[
        bool, "NOTIFICATION_DATA: notifications say how far the guest is; rules out ioeventfds"
    ] = False
    notif_config_data: Annotated[
        bool, "NOTIF_CONFIG_DATA: notifications name a queue by a number that the device has chosen"
    ] = False
    suspend: Annotated[bool, "SUSPEND: the guest may stop the device, and let it go on where it was"] = False
    iommu_platform: Annotated[
        bool, "ACCESS_PLATFORM: the guest puts the device behind its (virtual) IOMMU if it has one"
    ] = False
    queue_size: Annotated[
        int | None,
        "entries of each queue, 1 to 32768, a power of two unless packed=on; default: what suits the device",
    ] = None
    poll: Annotated[
        Poll,
        "look at queues without being notified: on (always, takes a CPU), adaptive (for a moment after work), off",
    ] = "adaptive"

    def __post_init__(self) -> None:
        size = self.queue_size
        if size is None:
            return
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise ConfigError(f"queue-size={size}: expected 1 to {MAX_QUEUE_SIZE}")
        if size & (size - 1) and not self.packed:
            raise ConfigError(f"queue-size={size} is no power of two: a split queue must be one; or add packed=on")

    @property
    def features(self) -> int:
        """The reserved feature bits, as a mask; VERSION_1 is always among them."""
        chosen = (feature for name, feature in _FEATURES.items() if getattr(self, name))
        return Feature.VERSION_1.mask | mask_of(chosen)


_FEATURES = {
    "indirect_desc": Feature.INDIRECT_DESC,
    "event_idx": Feature.EVENT_IDX,
    "iommu_platform": Feature.ACCESS_PLATFORM,
    "packed": Feature.RING_PACKED,
    "in_order": Feature.IN_ORDER,
    "notification_data": Feature.NOTIFICATION_DATA,
    "notif_config_data": Feature.NOTIF_CONFIG_DATA,
    "queue_reset": Feature.RING_RESET,
    "suspend": Feature.SUSPEND,
}
