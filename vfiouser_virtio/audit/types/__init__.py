"""Watches of what drivers ask of devices, one for each type that has rules of its own (virtio 1.4, 5)."""

from vfiouser_virtio.audit.chains import ChainWatch
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.virtio import DeviceCore


def chain_watch(core: DeviceCore, findings: Findings) -> ChainWatch | None:
    """The watch of a device's requests; None for a type without one."""
    del core, findings
    return None
