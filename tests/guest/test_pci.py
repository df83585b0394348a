"""Enumeration of functions that are made of bytes, with layouts that are not ours."""

import pytest
from support.guest import FakeBar, FakePort

from vfiouser_virtio.guest import BarInfo, DeviceBroken, MsixInfo, enumerate_function, set_command, set_msix

IO, MEM64, PREFETCH = 1, 4, 8


async def broken(port: FakePort, what: str) -> None:
    with pytest.raises(DeviceBroken, match=what) as caught:
        await enumerate_function(port)
    assert caught.value.rule == "PI1"


async def test_numbers() -> None:
    info = await enumerate_function(FakePort())
    assert (info.vendor, info.device, info.subsystem_vendor, info.subsystem) == (0x1AF4, 0x1042, 0x5000, 0x1042)
    assert (info.class_code, info.revision, info.interrupt_pin, info.virtio_id) == (0x018000, 1, 1, 2)
    assert (info.bars, info.capabilities, info.msix) == ((), (), None)
    assert str(info) == "1af4:1042 class 018000 rev 01"


@pytest.mark.parametrize("vendor", [0xFFFF, 0])
async def test_nothing_there(vendor: int) -> None:
    port = FakePort()
    port.put(0, 2, vendor)
    await broken(port, "nothing is there")


async def test_a_bridge_is_no_endpoint() -> None:
    port = FakePort()
    port.put(0x0E, 1, 0x81)
    await broken(port, "header type 0x81")


async def test_bars_of_all_kinds() -> None:
    port = FakePort(
        {
            0: FakeBar(0x20, IO, 0xC000),
            1: FakeBar(0x1000, 0, 0xFEBD_1000),
            2: FakeBar(1 << 33, MEM64 | PREFETCH, 0x38_0000_0000),
            5: FakeBar(16, PREFETCH),
        }
    )
    before = bytes(port.config)
    port.put(4, 2, 7)
    info = await enumerate_function(port)
    assert info.bars == (
        BarInfo(0, "io", 0x20, prefetchable=False, address=0xC000),
        BarInfo(1, "mem32", 0x1000, prefetchable=False, address=0xFEBD_1000),
        BarInfo(2, "mem64", 1 << 33, prefetchable=True, address=0x38_0000_0000),
        BarInfo(5, "mem32", 16, prefetchable=True, address=0),
    )
    assert info.bar(2) is info.bars[2]
    assert info.bar(3) is None
    # It did not answer anywhere while its BARs held nonsense, and is as it was.
    assert not port.decoding_while_sizing
    assert info.command == 7
    port.put(4, 2, 0)
    assert bytes(port.config) == before


async def test_an_io_bar_with_16_bits() -> None:
    port = FakePort({0: FakeBar(0x40, IO)})
    written = port.bar_written
    port.bar_written = lambda index, value: written(index, value) & 0xFFFF
    assert (await enumerate_function(port)).bars[0].size == 0x40


async def test_bars_that_cannot_be() -> None:
    port = FakePort({5: FakeBar(0x1000, MEM64)})
    await broken(port, "BAR5 says that it has 64 bits")
    port = FakePort({0: FakeBar(0x1000)})
    port.bar_written = lambda index, value: value & 0xF0F0_F000
    await broken(port, "BAR0 decodes address bits 0xf0f0f000")
    port.bar_written = lambda index, value: 8
    await broken(port, "BAR0 decodes address bits 0x0")


async def test_the_command_register_comes_back_after_a_failure() -> None:
    port = FakePort({5: FakeBar(0x1000, MEM64)})
    port.put(4, 2, 0x406)
    await broken(port, "BAR5")
    assert port.get(4, 2) == 0x406


# ---- capabilities --------------------------------------------------------------------------------------------------


async def test_the_list_in_its_order_with_all_the_bytes_that_are_known() -> None:
    port = FakePort()
    port.add_capability(0x09, bytes([7]) + b"abcd")
    port.add_capability(0x01, bytes(range(6)))
    port.add_capability(0x77, b"xy")
    info = await enumerate_function(port)
    assert [(capability.id, capability.offset) for capability in info.capabilities] == [
        (9, 0x40),
        (1, 0x48),
        (0x77, 0x50),
    ]
    assert info.capabilities[0].data == bytes([9, 0x48, 7]) + b"abcd"
    assert info.capabilities[1].data[2:] == bytes(range(6))
    assert info.capabilities[2].data == b"\x77\0xy"
    assert info.find(1) is info.capabilities[1]
    assert info.find(0x10) is None


async def test_a_list_that_runs_backwards() -> None:
    port = FakePort()
    for at, following in ((0xF0, 0x80), (0x80, 0x40), (0x40, 0)):
        port.config[at : at + 4] = bytes([0x77, following, 0, 0])
    port.put(0x34, 1, 0xF3)  # the lower two bits mean nothing
    port.put(6, 2, 0x10)
    assert [capability.offset for capability in (await enumerate_function(port)).capabilities] == [0xF0, 0x80, 0x40]


async def test_without_the_status_bit_there_is_no_list() -> None:
    port = FakePort()
    port.add_capability(0x77, b"xy")
    port.put(6, 2, 0)
    assert (await enumerate_function(port)).capabilities == ()


@pytest.mark.parametrize("back_to", [0x40, 0x44, 0x48])
async def test_a_loop(back_to: int) -> None:
    port = FakePort()
    for _ in range(3):
        port.add_capability(0x77, b"xy")
    port.put(0x49, 1, back_to)
    await broken(port, f"comes back to {back_to:#04x}")


@pytest.mark.parametrize("at", [0x04, 0x3C])
async def test_a_capability_inside_of_the_header(at: int) -> None:
    port = FakePort()
    port.add_capability(0x77, b"xy")
    port.put(0x41, 1, at)
    await broken(port, f"a capability at {at:#04x}, inside the header")


@pytest.mark.parametrize(("cap_id", "at", "length"), [(9, 0xF0, 17), (0x11, 0xF8, 0), (9, 0xFC, 0xFF)])
async def test_a_capability_that_ends_beyond_config_space(cap_id: int, at: int, length: int) -> None:
    port = FakePort()
    port.config[at : at + 3] = bytes([cap_id, 0, length])
    port.put(0x34, 1, at)
    port.put(6, 2, 0x10)
    await broken(port, "ends beyond config space")


# ---- switches ------------------------------------------------------------------------------------------------------


async def test_msix() -> None:
    port = FakePort()
    at = port.add_capability(0x11, bytes([0x02, 0x00]) + (0x2003).to_bytes(4, "little") + (0x801).to_bytes(4, "little"))
    info = await enumerate_function(port)
    msix = info.msix
    assert msix is not None
    assert msix == MsixInfo(at, vectors=3, table_bar=3, table_offset=0x2000, pba_bar=1, pba_offset=0x800)
    for enable, mask_all, flags in ((True, True, 0xC002), (True, False, 0x8002), (False, False, 0x0002)):
        await set_msix(port, msix, enable=enable, mask_all=mask_all)
        assert port.get(at + 2, 2) == flags


async def test_command() -> None:
    port = FakePort()
    assert await set_command(port, set=6) == 6
    assert await set_command(port, set=0x400, clear=2) == 0x404
    assert port.get(4, 2) == 0x404
