"""Set-up of a ring: where its parts are in guest memory, and which class it is (virtio 1.4, 2.7 and 2.8)."""

from typing import NamedTuple

from vfiouser_virtio.protocols.virtio.ring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    PACKED_DESC_ALIGN,
    PACKED_EVENT_ALIGN,
    PACKED_EVENT_SIZE,
    USED_ALIGN,
    avail_size,
    desc_size,
    packed_desc_size,
    used_size,
)
from vfiouser_virtio.vring.descriptors import Memory
from vfiouser_virtio.vring.features import RingFeatures
from vfiouser_virtio.vring.ring import Ring
from vfiouser_virtio.vring.split import SplitRing


class Area(NamedTuple):
    """Area of guest memory that holds one part of a ring."""

    address: int
    length: int
    write: bool
    """The device writes it."""
    align: int
    """``address`` must be a multiple of this."""


def ring_areas(size: int, features: RingFeatures, desc: int, driver: int, device: int) -> list[Area]:
    """The three parts of a ring whose addresses the driver has set, descriptors first (2.7, 2.8)."""
    if features.packed:
        return [
            Area(desc, packed_desc_size(size), write=True, align=PACKED_DESC_ALIGN),
            Area(driver, PACKED_EVENT_SIZE, write=False, align=PACKED_EVENT_ALIGN),
            Area(device, PACKED_EVENT_SIZE, write=True, align=PACKED_EVENT_ALIGN),
        ]
    return [
        Area(desc, desc_size(size), write=False, align=DESC_ALIGN),
        Area(driver, avail_size(size), write=False, align=AVAIL_ALIGN),
        Area(device, used_size(size), write=True, align=USED_ALIGN),
    ]


def make_ring(size: int, memory: Memory, features: RingFeatures) -> Ring:
    """The ring that these features ask for."""
    if features.packed:
        from vfiouser_virtio.vring.packed import PackedRing  # only here: few drivers are offered one

        return PackedRing(size, memory, features)
    return SplitRing(size, memory, features)
