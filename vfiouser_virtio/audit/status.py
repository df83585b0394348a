"""Watch of ``device_status``: initialization, resets, what comes too early (virtio 1.4, 2.1, 3.1, 4.1.4.3)."""

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.virtio.driver_activity import status_names

_STATUS = "2.1.1 Device Status Field"
_INIT = "3.1.1 Device Initialization"
_COMMON = "4.1.4.3.2 Common configuration structure layout"

RESET_FIRST = must(
    "init/reset-first", _INIT, "Initialization begins with a reset.", "status bits set without a 0 written before"
)
ACKNOWLEDGE_FIRST = must(
    "init/acknowledge-first",
    _INIT,
    "ACKNOWLEDGE is set before DRIVER: these are two steps.",
    "DRIVER set while ACKNOWLEDGE is not, or in the same write",
)
DRIVER_FIRST = must(
    "init/driver-first",
    _INIT,
    "DRIVER is set before features are accepted.",
    "driver_feature or FEATURES_OK written while DRIVER is not set",
)
FEATURES_OK_FIRST = must(
    "init/features-ok-first",
    _INIT,
    "FEATURES_OK is set, and found set, before DRIVER_OK.",
    "DRIVER_OK set while FEATURES_OK is not, or in the same write",
)
FEATURES_OK_READ = must(
    "init/features-ok-read",
    _INIT,
    "After FEATURES_OK was set, device_status is read again, before anything else is set up.",
    "a queue enabled, or DRIVER_OK set, with no read of device_status since FEATURES_OK was written",
)
REFUSED = must(
    "init/refused",
    _INIT,
    "A driver whose features the device has refused does not go on.",
    "a queue enabled, or DRIVER_OK set, after device_status was read without FEATURES_OK",
)
QUEUE_EARLY = must(
    "init/queue-early",
    _INIT,
    "Queues are set up after FEATURES_OK.",
    "queue_enable written while FEATURES_OK is not set",
)
CONFIG_EARLY = must(
    "init/config-write-early",
    _INIT,
    "The device's configuration is not written before FEATURES_OK.",
    "a write to it while FEATURES_OK is not set, but for a console's emergency write",
)
NOTIFY_EARLY = must(
    "init/notify-early",
    _INIT,
    "No available buffer notification is sent before DRIVER_OK.",
    "a write to the notification structure while DRIVER_OK is not set",
)
CLEAR = must(
    "status/clear",
    _STATUS,
    "No status bit is cleared, but by a reset.",
    "a write of device_status without a bit that is set",
)
FAILED = must(
    "status/failed",
    _STATUS,
    "After FAILED the device is reset before it is initialized again.",
    "another bit of device_status set while FAILED is",
)
RESET_WAIT = must(
    "status/reset-wait",
    _COMMON,
    "After a reset the driver waits until device_status reads 0, before it initializes the device.",
    "device_status written after a 0 that was not followed by a read of 0",
)

_OWN = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.DRIVER_OK | DeviceStatus.FEATURES_OK
_OWN |= DeviceStatus.FAILED
"""Bits that are the driver's to set."""


class StatusWatch(Watch):
    """Watch of the steps of initialization."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._was_reset = self._reset_unread = False
        self._features_ok_unread = self._asked = self._refused = False

    def reset(self) -> None:
        """The function was reset from outside: that is not the driver's first step."""
        self._was_reset = self._reset_unread = False
        self._forget()

    def _forget(self) -> None:
        self._features_ok_unread = self._asked = self._refused = False

    def field_read(self, name: str, value: int) -> None:
        """A read of 0 ends a reset; a read without FEATURES_OK says that the device has refused."""
        if name != "device_status":
            return
        if value == 0:
            self._reset_unread = False
        self._features_ok_unread = False
        if self._asked and not value & DeviceStatus.FEATURES_OK:
            self._refused = True

    def field_written(self, name: str, value: int) -> None:
        """Status, and what depends on it."""
        if name == "device_status":
            self._status_written(value)
        elif name == "driver_feature" and not self.core.status & DeviceStatus.DRIVER:
            self.broke(DRIVER_FIRST, f"wrote driver_feature {value:#x} in status {status_names(self.core.status)}")
        elif name == "queue_enable" and value:
            if not self.core.status & DeviceStatus.FEATURES_OK:
                seen = f"enabled a queue in status {status_names(self.core.status)}"
                self.broke(REFUSED if self._refused else QUEUE_EARLY, seen)
            self._check_read("enabled a queue")

    def _check_read(self, did: str) -> None:
        if self._features_ok_unread:
            self._features_ok_unread = False
            self.broke(FEATURES_OK_READ, f"{did} without a read of device_status since FEATURES_OK")

    def _status_written(self, value: int) -> None:
        if value == 0:
            self._was_reset = self._reset_unread = True
            self._forget()
            return
        if self._was_reset or not self.core.status & _OWN:
            self.findings.run += 1
        words = f"wrote device_status {status_names(value)}"
        if self._reset_unread:
            self._reset_unread = False
            self.broke(RESET_WAIT, f"{words} without a read of 0 since the reset")
            if self.core.status:
                return  # the device is still at its reset
        before = self.core.status & _OWN
        new = value & _OWN & ~before
        after = f"{words} where it was {status_names(self.core.status)}"
        if not before and not self._was_reset:
            self.broke(RESET_FIRST, after)
        self._was_reset = False
        if before & DeviceStatus.FAILED:
            if new:
                self.broke(FAILED, after)
            return
        if before & ~value:
            self.broke(CLEAR, after)
        if new & DeviceStatus.DRIVER and not before & DeviceStatus.ACKNOWLEDGE:
            self.broke(ACKNOWLEDGE_FIRST, after)
        if new & DeviceStatus.FEATURES_OK and not before & DeviceStatus.DRIVER:
            self.broke(DRIVER_FIRST, after)
        if new & DeviceStatus.DRIVER_OK and not self.core.status & DeviceStatus.SUSPEND:
            if not before & DeviceStatus.FEATURES_OK:
                self.broke(REFUSED if self._refused else FEATURES_OK_FIRST, after)
            self._check_read("set DRIVER_OK")
        if new & DeviceStatus.FEATURES_OK:
            self._features_ok_unread = self._asked = True

    def config_written(self, offset: int, data: bytes) -> None:
        """A console's emergency write works in any status (5.3.4)."""
        if self.core.status & DeviceStatus.FEATURES_OK:
            return
        if "emerg_wr" not in self.core.device.driver_writes:
            seen = f"wrote {len(data)} bytes at {offset:#x} in status {status_names(self.core.status)}"
            self.broke(CONFIG_EARLY, seen)

    def notified(self, offset: int, data: bytes) -> None:
        """Of a suspended device another watch knows more."""
        status = self.core.status
        if not status & (DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND):
            self.broke(NOTIFY_EARLY, f"notified ({bytes(data).hex()} at {offset:#x}) in status {status_names(status)}")
