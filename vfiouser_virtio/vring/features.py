"""Negotiated features that change how a ring is used (virtio 1.4, 6)."""

from typing import NamedTuple, Self

from vfiouser_virtio.protocols.virtio.features import Feature


class RingFeatures(NamedTuple):
    """Features that the driver has accepted."""

    indirect: bool = False
    """INDIRECT_DESC: a descriptor may name a table of descriptors (2.7.5.3, 2.8.7)."""
    event_idx: bool = False
    """EVENT_IDX: each side says at which entry it wants to be notified (2.7.7, 2.7.10, 2.8.10)."""
    packed: bool = False
    """RING_PACKED: one ring that both sides write (2.8) in the place of three (2.7)."""
    in_order: bool = False
    """IN_ORDER: buffers are used in the order in which they were made available (2.7.9, 2.8.9)."""

    @classmethod
    def of(cls, mask: int) -> Self:
        """From the 128 bits that were negotiated."""
        return cls(
            indirect=bool(mask & Feature.INDIRECT_DESC.mask),
            event_idx=bool(mask & Feature.EVENT_IDX.mask),
            packed=bool(mask & Feature.RING_PACKED.mask),
            in_order=bool(mask & Feature.IN_ORDER.mask),
        )
