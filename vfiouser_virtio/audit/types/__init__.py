"""Watches of what drivers ask of devices, one for each type that has rules of its own (virtio 1.4, 5)."""

from collections.abc import Mapping

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.types.balloon import BalloonWatch
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.audit.types.blk import BlkWatch
from vfiouser_virtio.audit.types.console import ConsoleWatch
from vfiouser_virtio.audit.types.net import NetWatch
from vfiouser_virtio.audit.types.simple import InputWatch, RngWatch
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.virtio import DeviceCore

_WATCHES: Mapping[int, type[RequestWatch]] = {
    DeviceId.NET: NetWatch,
    DeviceId.BLOCK: BlkWatch,
    DeviceId.CONSOLE: ConsoleWatch,
    DeviceId.RNG: RngWatch,
    DeviceId.BALLOON: BalloonWatch,
    DeviceId.INPUT: InputWatch,
}


def request_watch(core: DeviceCore, findings: Findings) -> RequestWatch:
    """The watch of a device's requests; one that sees nothing for a type without rules of its own."""
    return _WATCHES.get(core.device.device_id, RequestWatch)(core, findings)
