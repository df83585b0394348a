"""Virtio structures in places that no device of ours has them in."""

import pytest
from support.guest import FakeBar, FakePort

from vfiouser_virtio.guest import (
    DeviceBroken,
    VirtioLayout,
    enumerate_function,
    locate,
    virtio_structures,
    window_read,
    window_write,
)

COMMON, NOTIFY, ISR, DEVICE, PCI, SHM, VENDOR = 1, 2, 3, 4, 5, 8, 9
MULTIPLIER = (4).to_bytes(4, "little")


def function(*, without: int = 0) -> FakePort:
    """A device that is complete, in one BAR."""
    port = FakePort({0: FakeBar(0x4000), 2: FakeBar(0x1000), 4: FakeBar(1 << 33, 4)})
    structures = {COMMON: (0, 0x1000, 64), NOTIFY: (0, 0x2000, 0x100), ISR: (0, 0x3000, 1), DEVICE: (0, 0x3800, 0x100)}
    for kind, (bar, offset, length) in structures.items():
        if kind != without:
            port.add_structure(kind, bar, offset, length, MULTIPLIER if kind == NOTIFY else b"")
    return port


async def layout(port: FakePort) -> VirtioLayout:
    return locate(await enumerate_function(port))


async def test_all_in_one_bar() -> None:
    found = await layout(function())
    assert (found.common.bar, found.common.offset, found.common.length) == (0, 0x1000, 64)
    assert (found.notify.offset, found.notify.multiplier) == (0x2000, 4)
    assert (found.isr.offset, found.pci_cfg, found.shared_memory) == (0x3000, None, {})
    assert found.device is not None
    assert found.device.offset == 0x3800


async def test_each_in_a_bar_of_its_own_in_reversed_order() -> None:
    port = FakePort({index: FakeBar(0x1000) for index in (0, 1, 3, 5)})
    port.add_capability(0x77, b"xy")
    port.add_structure(DEVICE, 0, 0x10, 0x20)
    port.add_structure(PCI, 0, 0, 0, bytes(4))
    port.add_structure(ISR, 1, 0xFFF, 1)
    port.add_structure(NOTIFY, 3, 0x2, 0x2, bytes(4))
    port.add_structure(COMMON, 5, 0x4, 0x38)
    found = await layout(port)
    assert [found.common.bar, found.notify.bar, found.isr.bar] == [5, 3, 1]
    assert found.notify.multiplier == 0
    assert found.device is not None
    assert found.pci_cfg is not None


async def test_the_first_of_a_kind_is_the_devices_favourite() -> None:
    port = function()
    port.add_structure(COMMON, 2, 0, 64)
    assert (await layout(port)).common.bar == 0


@pytest.mark.parametrize(
    ("kind", "bar", "offset", "length", "cap_len", "problem"),
    [
        (COMMON, 6, 0x1000, 64, 0, "PC1: bar 0x6 is reserved"),
        (COMMON, 0xFF, 0x1000, 64, 0, "PC1: bar 0xff is reserved"),
        (COMMON, 1, 0x1000, 64, 0, "CC1: it ends beyond BAR1, which has 0x0 bytes"),
        (COMMON, 2, 0xFC4, 64, 0, "CC1: it ends beyond BAR2, which has 0x1000 bytes"),
        (COMMON, 2, 0xFFFF_FFFC, 0xFFFF_FFFF, 0, "CC1: it ends beyond BAR2"),
        (COMMON, 2, 0x1000, 0x37, 0, "CC1: length 0x37 is less than 0x38"),
        (COMMON, 2, 2, 64, 0, "CC1: offset 0x2 is not aligned to 4"),
        (COMMON, 2, 0, 64, 15, ""),  # too short to be told from another vendor capability: not a structure at all
        (NOTIFY, 2, 0, 64, 16, "PC1: cap_len 0x10 is less than 0x14"),
        (NOTIFY, 2, 1, 64, 0, "NT1: offset 0x1 is not aligned to 2"),
        (NOTIFY, 2, 0, 1, 0, "NT1: length 0x1 is less than 0x2"),
        (ISR, 2, 0, 0, 0, "IS1: length 0x0"),
        (DEVICE, 2, 2, 4, 0, "DC1: offset 0x2"),
        (SHM, 2, 0, 4, 16, "PC1: cap_len 0x10 is less than 0x18"),
        (PCI, 0, 0, 0, 16, "PA1: cap_len 0x10 has no room for pci_cfg_data"),
        (7, 2, 0, 4, 0, "PC1: cfg_type 0x7 is reserved"),
        (VENDOR, 2, 0, 4, 0, ""),
    ],
)
async def test_what_cannot_be_used_is_passed_over(
    kind: int, bar: int, offset: int, length: int, cap_len: int, problem: str
) -> None:
    port = FakePort({0: FakeBar(0x4000), 2: FakeBar(0x1000)})
    tail = bytes(4) if kind == NOTIFY and not cap_len else b""
    at = port.add_structure(kind, bar, offset, length, tail, cap_len=cap_len)
    for good, where in ((COMMON, 0x100), (NOTIFY, 0x200), (ISR, 0x300), (DEVICE, 0x400)):
        port.add_structure(good, 0, where, 64, MULTIPLIER if good == NOTIFY else b"")
    info = await enumerate_function(port)
    structure = next((each for each in virtio_structures(info) if each.cap_offset == at), None)
    if structure is not None:
        assert structure.problem.startswith(problem)
        assert bool(structure.problem) is bool(problem)
    found = locate(info)
    assert (found.common.offset, found.notify.offset, found.isr.offset) == (0x100, 0x200, 0x300)
    assert found.device is not None
    assert found.device.offset == 0x400


@pytest.mark.parametrize(("kind", "rule"), [(COMMON, "CC1"), (NOTIFY, "NT1"), (ISR, "IS1")])
async def test_what_must_be_there(kind: int, rule: str) -> None:
    with pytest.raises(DeviceBroken, match="none is there") as caught:
        await layout(function(without=kind))
    assert caught.value.rule == rule


async def test_what_is_there_but_unusable_is_named() -> None:
    port = function(without=NOTIFY)
    port.add_structure(NOTIFY, 2, 0xFFE, 4, MULTIPLIER)
    with pytest.raises(
        DeviceBroken, match=r"no usable NOTIFY structure: NOTIFY at BAR2 0xffe\+0x4: NT1: it ends beyond"
    ):
        await layout(port)


async def test_a_device_without_configuration() -> None:
    assert (await layout(function(without=DEVICE))).device is None


async def test_shared_memory_has_64_bits_and_ids() -> None:
    port = function()
    high = (1).to_bytes(4, "little")
    port.add_structure(SHM, 4, 0x1000, 0x2000, high + bytes(4), shmid=5)
    port.add_structure(SHM, 4, 0, 0x1000, bytes(8), shmid=0)
    port.add_structure(SHM, 4, 0x8000, 0x1000, bytes(8), shmid=5)  # ids are unique (SM1): the first one counts
    port.add_structure(SHM, 4, 0, 1, bytes(4) + (2).to_bytes(4, "little"), shmid=7)  # as long as the BAR, and one more
    found = await layout(port)
    assert sorted(found.shared_memory) == [0, 5]
    assert (found.shared_memory[5].offset, found.shared_memory[5].length) == (0x1_0000_1000, 0x2000)


async def test_the_window() -> None:
    port = function()
    at = port.add_structure(PCI, 0, 0, 0, bytes(4))
    pci_cfg = (await layout(port)).pci_cfg
    assert pci_cfg is not None
    port.log.clear()
    await window_write(port, pci_cfg, 4, 0x2000, 2, 0xBEEF)
    assert await window_read(port, pci_cfg, 4, 0x2000, 2) == 0xBEEF
    aim = [("config write", at + 4, 1, 4), ("config write", at + 8, 4, 0x2000), ("config write", at + 12, 4, 2)]
    assert port.log == [*aim, ("config write", at + 16, 2, 0xBEEF), *aim, ("config read", at + 16, 2, 0)]
