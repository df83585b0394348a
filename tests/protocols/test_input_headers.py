"""protocols/virtio/input.py against linux/virtio_input.h, linux/input.h and linux/input-event-codes.h."""

import pytest
from support.uapi import defines, struct_layout

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import input as wire

HEADER = "linux/virtio_input.h"
CODES = "linux/input-event-codes.h"


def test_layouts_are_linux_s() -> None:
    theirs = struct_layout(HEADER, "virtio_input_config")
    ours = offsets(wire.CONFIG)
    assert {name: theirs[name] for name in ("select", "subsel", "size", "reserved")} == {
        name: place for name, place in ours.items() if name != "data"
    }
    assert wire.CONFIG.sizeof() == max(at + size for at, size in theirs.values())
    assert offsets(wire.ABSINFO) == struct_layout(HEADER, "virtio_input_absinfo")
    assert offsets(wire.DEVIDS) == struct_layout(HEADER, "virtio_input_devids")
    assert offsets(wire.EVENT) == struct_layout(HEADER, "virtio_input_event")


@pytest.mark.parametrize("codes", [wire.Ev, wire.Syn, wire.Rel, wire.Abs, wire.Btn, wire.Led, wire.Snd, wire.Rep])
def test_codes_are_linux_s(codes: type[wire.Ev]) -> None:
    known = defines(CODES)
    assert {f"{codes.__name__.upper()}_{code.name}": code for code in codes}.items() <= known.items()


def test_keys_and_limits_are_linux_s() -> None:
    known = defines(CODES)
    assert {f"KEY_{name.upper()}": code for name, code in wire.KEYS.items()}.items() <= known.items()
    for kind, last in wire.MAX_CODE.items():
        assert known[f"{kind.name}_MAX"] >= last
        assert known[f"{kind.name}_MAX"] == last or kind is wire.Ev.SW
    assert known["EV_MAX"] == wire.MAX_TYPE
    assert {f"INPUT_PROP_{prop.name}": prop for prop in wire.Prop}.items() <= known.items()
    selects = defines(HEADER)
    assert {f"VIRTIO_INPUT_CFG_{select.name}": select for select in wire.Select}.items() <= selects.items()
    assert defines("linux/input.h")["BUS_VIRTUAL"] == wire.BUS_VIRTUAL
