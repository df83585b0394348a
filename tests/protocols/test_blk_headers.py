"""`protocols.virtio.blk` against linux/virtio_blk.h, which may be older than the specification but must not differ."""

import pytest
from support.uapi import defines, struct_layout

from vfiouser_virtio.protocols.codec import Schema, offsets
from vfiouser_virtio.protocols.virtio import blk

HEADER = "linux/virtio_blk.h"

# What the header has for legacy drivers only, or does not know yet.
LEGACY = {"BARRIER", "SCSI", "WCE"}


@pytest.mark.parametrize(
    ("schema", "struct"),
    [
        (blk.CONFIG, "virtio_blk_config"),
        (blk.REQUEST_HEADER, "virtio_blk_outhdr"),
        (blk.SEGMENT, "virtio_blk_discard_write_zeroes"),
    ],
)
def test_layout(schema: Schema, struct: str) -> None:
    theirs = struct_layout(HEADER, struct)
    ours = offsets(schema)
    inner = {name for name in theirs if any(other.startswith(f"{name}_") and other in ours for other in theirs)}
    assert {name: place for name, place in theirs.items() if name not in inner} == {
        name: place for name, place in ours.items() if name in theirs
    }
    assert set(ours) - set(theirs) <= {name for name in ours if name.startswith("zoned_")}


def test_config_is_as_long_as_in_the_specification() -> None:
    assert blk.CONFIG.sizeof() == 96
    assert offsets(blk.CONFIG)["zoned_zone_sectors"] == (72, 4)


def test_features() -> None:
    prefix = "VIRTIO_BLK_F_"
    theirs = {name.removeprefix(prefix): bit for name, bit in defines(HEADER).items() if name.startswith(prefix)}
    ours = {feature.name: int(feature) for feature in blk.BlkFeature}
    assert {name: bit for name, bit in theirs.items() if name not in LEGACY}.items() <= ours.items()


def test_request_types_and_status() -> None:
    known = defines(HEADER)
    for kind in blk.RequestType:
        name = f"VIRTIO_BLK_T_{kind.name}"
        assert known.get(name, int(kind)) == kind
    for status in blk.BlkStatus:
        assert known.get(f"VIRTIO_BLK_S_{status.name}", int(status)) == status
    assert {"VIRTIO_BLK_T_IN", "VIRTIO_BLK_T_DISCARD", "VIRTIO_BLK_S_UNSUPP"} <= known.keys()
    assert known["VIRTIO_BLK_ID_BYTES"] == blk.ID_BYTES
    assert known["VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP"] == blk.SegmentFlags.UNMAP
