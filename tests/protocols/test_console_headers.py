"""protocols/virtio/console.py against linux/virtio_console.h."""

from support.uapi import defines, struct_layout

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import console

HEADER = "linux/virtio_console.h"


def test_layouts_are_linux_s() -> None:
    assert offsets(console.CONFIG) == struct_layout(HEADER, "virtio_console_config")
    assert offsets(console.CONTROL.subcon) == struct_layout(HEADER, "virtio_console_control")


def test_numbers_are_linux_s() -> None:
    known = defines(HEADER)
    for feature in console.ConsoleFeature:
        assert known[f"VIRTIO_CONSOLE_F_{feature.name}"] == feature
    for event in console.Event:
        assert known[f"VIRTIO_CONSOLE_{event.name}"] == event


def test_resize_is_columns_then_rows() -> None:
    # No header has this one; virtio 1.4, 5.3.6.2.
    assert console.RESIZE.build({"cols": 0x1234, "rows": 0x5678}) == bytes.fromhex("34127856")
