"""Watch of available buffer notifications: address, width, name, data (virtio 1.4, 2.9, 4.1.4.4, 4.1.5.2)."""

from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.watch import Watch
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature

_NOTIFY = "4.1.5.2.1 Available Buffer Notifications"

ADDRESS = must(
    "notify/address",
    "4.1.4.4 Notification structure layout (prose)",
    "A queue is notified at queue_notify_off times notify_off_multiplier.",
    "the address of each notification: one that no queue has",
)
WIDTH_16 = must(
    "notify/16-bit", _NOTIFY, "Without NOTIFICATION_DATA, a notification has 16 bits.", "the width of each notification"
)
WIDTH_32 = must(
    "notify/32-bit", _NOTIFY, "With NOTIFICATION_DATA, a notification has 32 bits.", "the width of each notification"
)
INDEX = must(
    "notify/index",
    _NOTIFY,
    "Without NOTIF_CONFIG_DATA, a notification says the queue's index.",
    "the low 16 bits of each notification",
)
CONFIG_DATA = must(
    "notify/config-data",
    _NOTIFY,
    "With NOTIF_CONFIG_DATA, a notification says the queue's queue_notif_config_data.",
    "the low 16 bits of each notification",
)
NEXT = must(
    "notify/next",
    "2.8.16, 2.9 Driver Notifications",
    "With NOTIFICATION_DATA, next_off and next_wrap tell of the next descriptor that is not yet available.",
    "the high 16 bits of each notification: beyond what the ring has at that moment, or outside of it",
)
_MULTIPLIER = 4


class NotifyWatch(Watch):
    """Watch of writes to the notification structure."""

    def notified(self, offset: int, data: bytes) -> None:
        """Before DRIVER_OK it is the notification itself that is wrong: `status`."""
        core = self.core
        if not core.status & DeviceStatus.DRIVER_OK:
            return
        index, rest = divmod(offset, _MULTIPLIER)
        if rest or index >= len(core.queues):
            self.broke(ADDRESS, f"wrote {data.hex()} at {offset:#x}, which is the address of no queue")
            return
        with_data = bool(core.driver_features & Feature.NOTIFICATION_DATA.mask)
        size = 4 if with_data else 2
        if len(data) != size:
            self.broke(WIDTH_32 if with_data else WIDTH_16, f"queue {index}: notified with {8 * len(data)} bits")
            return
        name, by_data = int.from_bytes(data[:2], "little"), core.driver_features & Feature.NOTIF_CONFIG_DATA.mask
        due = core.notif_config_data(index) if by_data else index
        if name != due:
            self.broke(CONFIG_DATA if by_data else INDEX, f"queue {index}: notified as {name:#x} instead of {due:#x}")
        elif with_data and not core.queues[index].may_be_next(position := int.from_bytes(data[2:], "little")):
            self.broke(NEXT, f"queue {index}: notified with next {position:#x}, which cannot be")
