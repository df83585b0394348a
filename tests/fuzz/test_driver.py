"""The fuzzer's driver with devices that lie: they are served with `fault=` in scripts/soak."""

import pytest

from vfiouser_virtio.protocols.pci import CapId
from vfiouser_virtio.testing.fuzz.function_driver import capability

_LIST = 0x34


def _space(*capabilities: tuple[int, int, int], first: int = 0x40) -> bytes:
    space = bytearray(256)
    space[_LIST] = first
    for at, name, following in capabilities:
        space[at : at + 2] = name, following
    return bytes(space)


@pytest.mark.parametrize(
    ("space", "at"),
    [
        (_space((0x40, CapId.VNDR, 0x50), (0x50, CapId.PM, 0)), 0x50),
        (_space(first=0), 0),
        (b"\xff" * 256, 0),  # registers-all-ones: scripts/soak --seed 2007 has met one in its config space
        (_space((0x40, CapId.VNDR, 0x50), (0x50, CapId.VNDR, 0x40)), 0),  # capability-loop
        (_space((0x40, CapId.VNDR, 0xFF)), 0),
    ],
)
def test_a_list_of_capabilities_that_is_none_ends(space: bytes, at: int) -> None:
    assert capability(space, CapId.PM) == at
