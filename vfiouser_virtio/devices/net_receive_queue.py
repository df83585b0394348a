"""Receive queue of a network device with its statistics, and offloads that its driver takes (virtio 1.4, 5.1.9.4)."""

from dataclasses import dataclass, fields

from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.protocols.virtio.net import HdrFlags, NetFeature
from vfiouser_virtio.virtio import Queue

_NEEDS_CSUM, _DATA_VALID = int(HdrFlags.NEEDS_CSUM), int(HdrFlags.DATA_VALID)


def does_of(features: int) -> Does:
    """What a driver with these features takes upon itself. Segmentation requires GUEST_CSUM (5.1.3.1)."""
    does = Does(0)
    if features & NetFeature.GUEST_CSUM.mask:
        does |= Does.CSUM
        for bits, what in (
            ((NetFeature.GUEST_TSO4,), Does.TSO4),
            ((NetFeature.GUEST_TSO6,), Does.TSO6),
            ((NetFeature.GUEST_ECN,), Does.ECN),
            # A frame does not say of which of the two it is.
            ((NetFeature.GUEST_USO4, NetFeature.GUEST_USO6), Does.USO),
            ((NetFeature.GUEST_UDP_TUNNEL_GSO,), Does.TUNNEL),
            ((NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM,), Does.TUNNEL_CSUM),
        ):
            if all(features & bit.mask for bit in bits):
                does |= what
    return does


@dataclass(slots=True)
class ReceiveQueue:
    """Receive queue with its statistics (5.1.9.5.11.4), which grow until the device is reset."""

    queue: Queue
    packets: int = 0
    bytes: int = 0
    drops: int = 0
    """Frames that did not get here, for whatever reason but the filter."""
    drop_overruns: int = 0
    """Those for which the driver's buffers have no room."""
    csum_valid: int = 0
    needs_csum: int = 0
    csum_none: int = 0
    gso_packets: int = 0
    gso_bytes: int = 0

    def count(self, offload: Offload | None, length: int, packets: int = 1) -> None:
        """A frame has been delivered, or several of one kind with ``length`` bytes together."""
        self.packets += packets
        self.bytes += length
        if offload is None:
            self.csum_none += packets
            return
        if offload.flags & _NEEDS_CSUM:
            self.needs_csum += packets
        elif offload.flags & _DATA_VALID:
            self.csum_valid += packets
        else:
            self.csum_none += packets
        if offload.gso_type:
            self.gso_packets += packets
            self.gso_bytes += length

    def forget(self) -> None:
        """The device was reset."""
        for each in fields(self)[1:]:
            setattr(self, each.name, 0)
