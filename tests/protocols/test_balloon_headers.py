"""protocols/virtio/balloon.py against linux/virtio_balloon.h."""

from support.uapi import defines, struct_layout

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import balloon

HEADER = "linux/virtio_balloon.h"
# The specification's name, and the header's.
NAMES = {"PAGE_REPORTING": "REPORTING"}
_STAT = "VIRTIO_BALLOON_S_"


def test_layouts_are_linux_s() -> None:
    theirs = struct_layout(HEADER, "virtio_balloon_config")
    assert {name: theirs[name] for name in offsets(balloon.CONFIG)} == offsets(balloon.CONFIG)
    assert offsets(balloon.STAT) == struct_layout(HEADER, "virtio_balloon_stat")


def test_numbers_are_linux_s() -> None:
    known = defines(HEADER)
    for feature in balloon.BalloonFeature:
        assert known[f"VIRTIO_BALLOON_F_{NAMES.get(feature.name, feature.name)}"] == feature
    for command in balloon.CommandId:
        assert known[f"VIRTIO_BALLOON_CMD_ID_{command.name}"] == command
    assert 1 << known["VIRTIO_BALLOON_PFN_SHIFT"] == balloon.PAGE_SIZE
    # Headers of before Linux 6.12 have ten.
    theirs = {name.removeprefix(_STAT): tag for name, tag in known.items() if name.startswith(_STAT)}
    del theirs["NR"]
    assert theirs.items() <= {tag.name: int(tag) for tag in balloon.Stat}.items()
    assert len(theirs) >= 10
