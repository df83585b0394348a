"""Virtio device on PCI whose driver is audited: `VirtioPci` with watches of registers, config space and rings."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vfiouser_virtio.audit.common_cfg import CommonCfgWatch
from vfiouser_virtio.audit.config import ConfigWatch
from vfiouser_virtio.audit.features import FeatureWatch
from vfiouser_virtio.audit.findings import AuditLog, BrokenRule, Findings
from vfiouser_virtio.audit.input_query import InputQueryWatch
from vfiouser_virtio.audit.notifications import NotifyWatch
from vfiouser_virtio.audit.pci_config import PciConfigWatch
from vfiouser_virtio.audit.queues import QueueWatch
from vfiouser_virtio.audit.status import StatusWatch
from vfiouser_virtio.audit.suspend import SuspendWatch
from vfiouser_virtio.audit.types import request_watch
from vfiouser_virtio.audit.vectors import VectorWatch
from vfiouser_virtio.audit.virtqueue import AuditedVirtqueue
from vfiouser_virtio.audit.watch import Watch, Watches
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports.pci import DEVICE, ISR, NOTIFY, VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_device import AnswerLater, Buffer, Hold, IoEventFd, PciRegion
from vfiouser_virtio.virtio import Device, DeviceCore

logger = logging.getLogger(__name__)

_STATUS, _ = COMMON_CFG_OFFSETS["device_status"]


class AuditedVirtioPci(VirtioPci):
    """`VirtioPci` that tells ``findings`` what its driver does wrong, and is slower for it.

    It offers no ioeventfds: an eventfd does not say what was written. ``more`` are the arguments of `VirtioPci`; a
    ``core`` among them has virtqueues that are `AuditedVirtqueue`.
    """

    def __init__(self, device: Device, *, findings: Findings, **more: Any) -> None:
        more.setdefault("core", partial(DeviceCore, virtqueue=AuditedVirtqueue))
        super().__init__(device, **more)
        self._requests = request_watch(self.core, findings)
        for queue in self.core.queues:
            assert isinstance(queue, AuditedVirtqueue)
            queue.watch_with(findings, self._requests)
        kinds: list[type[Watch]] = [StatusWatch, FeatureWatch, QueueWatch, VectorWatch, NotifyWatch]
        kinds += [SuspendWatch, ConfigWatch]
        if device.device_id == DeviceId.INPUT:
            kinds.append(InputQueryWatch)
        self._watches = Watches([kind(self, findings) for kind in kinds], findings)
        self._tell = findings.tell
        self._common_watch = CommonCfgWatch(self._watches, findings)
        self._config_watch = PciConfigWatch(self, VIRTIO_BAR, findings)

    @property
    def vectors(self) -> int:
        """Size of the MSI-X table."""
        return 0 if self.msix is None else self.msix.count

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        """As `VirtioPci`; then the watches are told."""
        window = self._tell(self._config_watch.read, offset, count) if index == PciRegion.CONFIG else None
        late: AnswerLater | None = None
        try:
            data = super().region_read(index, offset, count)
        except AnswerLater as later:
            late, data = later, later.data
        if index == VIRTIO_BAR and index in self.bars.decoded:
            self._was_read(offset, bytes(data))
        elif window is not None:
            at, length = window
            self._was_read(at, bytes(data)[:length])
        if late is not None:
            try:
                raise late.kept()
            finally:
                del late  # else it and this frame keep each other
        return data

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """The watches are told; then as `VirtioPci`."""
        if index == VIRTIO_BAR and index in self.bars.decoded:
            self._will_be_written(offset, bytes(data))
        elif index == PciRegion.CONFIG:
            window = self._tell(self._config_watch.written, offset, bytes(data))
            if window is not None:
                at, length = window
                self._will_be_written(at, bytes(data)[:length])
        super().region_write(index, offset, data)

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        """None: each notification is to be seen."""
        del index
        return ()

    def reset(self) -> Hold | None:
        """As `VirtioPci`; the driver has not done this by ``device_status``."""
        self._tell(self._requests.reset)
        self._tell(self._config_watch.reset)
        self._watches.reset()
        return super().reset()

    def _was_read(self, offset: int, data: bytes) -> None:
        if offset < ISR:
            self._tell(self._common_watch.read, offset, data)
        elif offset < DEVICE:
            if offset == ISR:
                self._watches.isr_read()
        elif offset < NOTIFY:
            self._watches.config_read(offset - DEVICE, len(data))

    def _will_be_written(self, offset: int, data: bytes) -> None:
        if offset < ISR:
            self._tell(self._common_watch.write, offset, data)
            if offset == _STATUS and not any(data):
                self._tell(self._requests.reset)
        elif DEVICE <= offset < NOTIFY:
            self._watches.config_written(offset - DEVICE, data)
        elif offset >= NOTIFY:
            self._watches.notified(offset - NOTIFY, data)


def audited(
    log: AuditLog, name: str, function: type[AuditedVirtioPci] = AuditedVirtioPci
) -> Callable[..., AuditedVirtioPci]:
    """What makes the function of a device called ``name``, as `VirtioPci` does, with its findings in ``log``."""
    lines = DeviceLog(logger, name)

    def told(finding: BrokenRule) -> None:
        rule = finding.rule
        said = f"{finding.first}; {finding.faults}" if finding.faults else finding.first
        lines.info("driver broke %s (%s, %s): %s", rule.id, rule.keyword, rule.section, said)

    return partial(function, findings=log.of(name, told))
