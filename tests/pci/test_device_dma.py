"""Views of several ranges of guest memory for a `PciDevice`: at once, in a block, and held for work that is no task."""

import os
from collections.abc import Iterator

import pytest
import trio
from support.in_process_driver import AnsweringClient, InProcessDriver
from support.pci import Client

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci import Dma, DmaFault, Identity, PciDevice
from vfiouser_virtio.transports.pci_device import PciDeviceFunction

READABLE, HOLE = 0x8_0000, 0x10_0000
"""Below is memory for both, behind it memory that can only be read, then none."""


class Plain(PciDevice):
    identity = Identity(0x1234, 1)


@pytest.fixture(params=["mapped", "by message"])
def driver(request: pytest.FixtureRequest) -> Iterator[InProcessDriver]:
    driver = InProcessDriver(PciDeviceFunction(Plain()), 0)
    by_message = request.param == "by message"
    driver.function.connected(AnsweringClient(driver.ram) if by_message else Client())
    for address, writable in ((0, True), (READABLE, False)):
        fd = None if by_message else os.dup(driver.ram)
        driver.function.dma_map(address, READABLE, readable=True, writable=writable, fd=fd, offset=address)
    driver.set_command(0x0006)
    yield driver
    driver.function.disconnected()
    os.close(driver.ram)


def dma_of(driver: InProcessDriver) -> Dma:
    return driver.function.device.dma


@pytest.mark.parametrize("driver", ["mapped"], indirect=True)
def test_views_at_once_are_the_memory(driver: InProcessDriver) -> None:
    dma = dma_of(driver)
    for _ in range(2):  # the second time it is known where
        views = dma.views_nowait([(0x100, 4), (0x1000, 2)], write=True)
        assert views is not None
        assert [len(each) for each in views] == [4, 2]
        views[0][:] = b"abcd"
        views[1][:] = b"ef"
        assert driver.get(0x100, 4) + driver.get(0x1000, 2) == b"abcdef"
        driver.put(0x100, b"ABCD")
        views = dma.views_nowait([(0x100, 4)])
        assert views is not None
        assert b"".join(views) == b"ABCD"
        assert views[0].readonly
    both = dma.views_nowait([(READABLE - 2, 4)])
    assert both is not None
    assert sum(map(len, both)) == 4
    for ranges, write in (
        ([(HOLE, 1)], False),
        ([(0, 4), (HOLE - 2, 4)], False),
        ([(0, 4), (READABLE, 4)], True),
        ([((1 << 64) - 1, 2)], False),
    ):
        with pytest.raises(DmaFault, match="DMA view of"):
            dma.views_nowait(ranges, write=write)
    for bad in ([(0x100, -1)], [(0x100, 4), (0x200, -4)]):
        with pytest.raises(AuthorError, match="never below 0"):
            dma.views_nowait(bad)
    dma.fence()
    dma.quiesce(True)
    assert dma.views_nowait([(0, 4)]) is None
    dma.quiesce(False)
    driver.set_command(0x0002)
    with pytest.raises(DmaFault, match="Bus Master"):
        dma.views_nowait([(0, 4)])


async def test_views_in_a_block(driver: InProcessDriver) -> None:
    dma = dma_of(driver)
    driver.put(0x100, b"abcdef")
    async with dma.views([(0x100, 2), (0x104, 2)]) as views:
        assert b"".join(views) == b"abef"
        assert views[0].readonly
    async with dma.views([(0x100, 2), (0x104, 2)], write=True) as views:
        views[1][:] = b"EF"
    assert driver.get(0x100, 6) == b"abcdEF"
    async with dma.views([]) as views:
        assert not list(views)
    for ranges, write in (([(0, 4), (HOLE, 4)], False), ([(0, 4), (READABLE, 4)], True)):
        with pytest.raises(DmaFault):
            async with dma.views(ranges, write=write):
                pass
    assert (dma.views_nowait([(0, 4)]) is None) == (driver.function.memory.regions[0].window is None)


@pytest.mark.parametrize("driver", ["mapped"], indirect=True)
async def test_views_hold_up_their_unmapping(driver: InProcessDriver) -> None:
    dma = dma_of(driver)

    async def keep_for_ever() -> None:
        async with dma.views([(0x100, 2), (0x1000, 2)]):
            hold = driver.function.dma_unmap(0, READABLE)
            assert hold is not None
            assert not hold.done
            hold.expire()
            await trio.sleep_forever()

    with pytest.raises(DmaFault, match="the client has taken the memory away"):
        await keep_for_ever()


@pytest.mark.parametrize("driver", ["mapped"], indirect=True)
def test_a_hold_lasts_until_it_is_released(driver: InProcessDriver) -> None:
    dma = dma_of(driver)
    asked: list[str] = []
    release = dma.hold([(READABLE, 4)], lambda: asked.append("cancel"))
    assert driver.function.dma_unmap(0, READABLE) is None, "that is other memory"
    hold = driver.function.dma_unmap(READABLE, READABLE)
    reset = driver.function.reset()
    assert hold is not None
    assert reset is not None
    assert not hold.done
    assert not reset.done
    assert asked == []
    hold.expire()
    assert asked == ["cancel"]
    release()
    assert hold.done
    assert reset.done


@pytest.mark.parametrize("driver", ["mapped"], indirect=True)
def test_an_area_is_the_memory_whatever_becomes_of_the_map(driver: InProcessDriver) -> None:
    dma = dma_of(driver)
    words = dma.area(0x100, 16, write=True, kind="Q")
    page = dma.area(READABLE, 8)
    for turn in range(3):
        view, other = words.view(), page.view()
        assert view is not None
        assert other is not None
        assert other.readonly
        assert (view.format, len(view), len(other)) == ("Q", 2, 8)
        view[1] = 0x1234 + turn
        assert driver.get(0x108, 8) == (0x1234 + turn).to_bytes(8, "little")
        driver.put(READABLE, bytes([turn] * 8))
        assert other == bytes([turn] * 8)
    fd = os.dup(driver.ram)
    driver.function.dma_unmap(0, READABLE)
    with pytest.raises(DmaFault):
        words.view()
    assert page.view() is not None
    driver.function.dma_map(0, READABLE, readable=True, writable=True, fd=fd, offset=0x2000)
    view = words.view()
    assert view is not None
    view[0] = 7
    assert driver.get(0x2100, 1) == b"\7", "it is looked up anew"


@pytest.mark.parametrize("driver", ["mapped"], indirect=True)
def test_an_area_is_not_there_without_bus_master_nor_in_a_hole(driver: InProcessDriver) -> None:
    dma = dma_of(driver)
    area = dma.area(0x100, 16)
    assert area.view() is not None
    dma.quiesce(True)
    assert area.view() is None
    dma.quiesce(False)
    assert area.view() is not None
    driver.set_command(0x0002)
    with pytest.raises(DmaFault, match="Bus Master"):
        area.view()
    driver.set_command(0x0006)
    assert area.view() is not None
    for address, length, write in ((HOLE, 8, False), (HOLE - 4, 8, False), (READABLE, 8, True)):
        with pytest.raises(DmaFault):
            dma.area(address, length, write=write).view()


@pytest.mark.parametrize("driver", ["by message"], indirect=True)
def test_an_area_without_a_file_descriptor_has_no_view(driver: InProcessDriver) -> None:
    assert dma_of(driver).area(0x100, 16).view() is None
