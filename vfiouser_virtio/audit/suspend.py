"""Watch of SUSPEND: what a driver does while its device is suspended (virtio 1.4, 3.4.1)."""

from typing import TypeAlias

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.virtqueue import AuditedPackedRing, AuditedSplitRing, AuditedVirtqueue
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.virtio.driver_activity import status_names

AuditedRing: TypeAlias = AuditedSplitRing | AuditedPackedRing

_SUSPEND = "3.4.1 Device Suspend"

EARLY = should(
    "suspend/early",
    _SUSPEND,
    "SUSPEND is set only with DRIVER_OK set, and if it was negotiated.",
    "writes of device_status with SUSPEND",
)
VERIFY = must(
    "suspend/verify",
    _SUSPEND,
    "After SUSPEND was set, device_status is read until SUSPEND is 1 and DRIVER_OK 0.",
    "the next write of device_status with no such read before",
)
NOTIFY = must("suspend/notify", _SUSPEND, "A suspended device is not notified.", "notifications after SUSPEND was set")
AVAILABLE = must(
    "suspend/available",
    _SUSPEND,
    "No buffer is made available to a suspended device.",
    "where the available buffers of each queue end when SUSPEND is set, and when DRIVER_OK is set again",
)
CONFIG = must(
    "suspend/config-write",
    _SUSPEND,
    "The configuration of a suspended device is not written.",
    "writes to it after SUSPEND was set",
)
RESUME = must(
    "suspend/resume-wait",
    _SUSPEND,
    "After DRIVER_OK was set again, device_status is read until SUSPEND is 0 and DRIVER_OK 1.",
    "a notification, or a write of the configuration, with no such read before",
)


class SuspendWatch(Watch):
    """Watch of a device between SUSPEND and the end of its resumption."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._asked = self._seen = self._resuming = False
        self._ends: list[tuple[AuditedVirtqueue, AuditedRing, int]] = []
        """Of each queue that can be looked at: its ring, and where the buffers ended that were available."""

    def reset(self) -> None:
        """Nothing is suspended."""
        self._asked = self._seen = self._resuming = False
        self._ends.clear()

    def field_read(self, name: str, value: int) -> None:
        """What the driver has seen of the device."""
        if name != "device_status":
            return
        suspended, running = value & DeviceStatus.SUSPEND, value & DeviceStatus.DRIVER_OK
        self._seen |= self._asked and bool(suspended) and not running
        if running and not suspended:
            self._resuming = False

    def field_written(self, name: str, value: int) -> None:
        """SUSPEND asked for, or taken back."""
        if name != "device_status":
            return
        status = self.core.status
        if not value:
            self.reset()
        elif self._asked:
            if not self._seen:
                self.broke(VERIFY, f"wrote device_status {status_names(value)} before it has seen SUSPEND")
            if value & DeviceStatus.DRIVER_OK:
                self._asked, self._resuming = False, True
                self._check_ends()
        elif value & DeviceStatus.SUSPEND and not status & DeviceStatus.SUSPEND:
            negotiated = self.core.driver_features & Feature.SUSPEND.mask
            if negotiated and status & DeviceStatus.DRIVER_OK:
                self._asked, self._seen = True, False
                queues = (queue for queue in self.core.queues if isinstance(queue, AuditedVirtqueue))
                rings = [(queue, ring) for queue in queues if (ring := queue.visible_ring()) is not None]
                self._ends = [(queue, ring, ring.end()) for queue, ring in rings]
            else:
                self.broke(
                    EARLY, f"set SUSPEND in status {status_names(status)}, {'' if negotiated else 'not '}negotiated"
                )

    def _check_ends(self) -> None:
        """The device has taken no buffer meanwhile, and if it has: that changes none of these."""
        for queue, ring, end in self._ends:
            if queue.visible_ring() is ring and ring.end() != end:
                self.broke(AVAILABLE, f"queue {queue.index}: buffers up to {ring.end():#x}, and to {end:#x} at SUSPEND")
        self._ends.clear()

    def notified(self, offset: int, data: bytes) -> None:
        """Of any queue."""
        if self._asked:
            self.broke(NOTIFY, f"notified ({data.hex()} at {offset:#x}) after SUSPEND")
        self._check_resumed("notified")

    def config_written(self, offset: int, data: bytes) -> None:
        """Any field."""
        if self._asked:
            self.broke(CONFIG, f"wrote {len(data)} bytes at {offset:#x} of the configuration after SUSPEND")
        self._check_resumed("wrote the configuration")

    def _check_resumed(self, did: str) -> None:
        if self._resuming:
            self._resuming = False
            self.broke(RESUME, f"{did} after DRIVER_OK, before it has seen the device resumed")
