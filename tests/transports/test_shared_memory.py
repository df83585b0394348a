"""Shared memory regions (virtio 1.4, 2.10): found and mapped by our driver, over PCI and in process."""

import pytest
import trio
import trio.testing
from support.pci_guest import Guest

from vfiouser_virtio.errors import AuthorError, ConfigError
from vfiouser_virtio.guest.pci import enumerate_function
from vfiouser_virtio.guest.pci_structures import locate
from vfiouser_virtio.guest.pci_transport import PciTransport
from vfiouser_virtio.protocols.virtio.pci import CfgType
from vfiouser_virtio.supervision.pci import SupervisedPci
from vfiouser_virtio.testing.carriers import pci_port
from vfiouser_virtio.transports import Loopback, VirtioPci
from vfiouser_virtio.vfio_device import RegionFlags
from vfiouser_virtio.virtio import Device, queue

MIB = 1 << 20


class Window(Device):
    """Region 5 of 64 KiB, and what a test adds."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self, *more: tuple[int, int]) -> None:
        super().__init__()
        self.window = self.add_shared_memory(5, 0x1_0000)
        for region_id, size in more:
            self.add_shared_memory(region_id, size)


def test_what_an_author_cannot_declare() -> None:
    device = Window()
    for region_id, size, why in ((5, 4096, "already"), (-1, 4096, "0 to 255"), (256, 4096, "0 to 255")):
        with pytest.raises(AuthorError, match=why):
            device.add_shared_memory(region_id, size)
    for size in (0, -4096, 4095, 1 << 41):
        with pytest.raises(AuthorError, match="multiple of 0x1000"):
            device.add_shared_memory(6, size)
    with pytest.raises(AuthorError, match="region 5 has no memory before"):
        _ = device.window.view
    with pytest.raises(ConfigError, match="without --supervise"):
        SupervisedPci(device, journal_fd=-1)


async def test_a_driver_finds_it_and_maps_it() -> None:
    device = Window()
    with trio.fail_after(60):
        async with pci_port(device, "socket") as port:
            transport = await PciTransport.open(port)
            ours, theirs = device.window.view, await transport.map_shared_memory(5)
            assert (len(ours), len(theirs), bytes(theirs)) == (0x1_0000, 0x1_0000, bytes(0x1_0000))
            theirs[-4:] = b"from"
            ours[:4] = b"back"
            assert (bytes(ours[-4:]), bytes(theirs[:4])) == (b"from", b"back")
            assert await port.bar_read(transport.layout.shared_memory[5].bar, 0, 4) == int.from_bytes(b"back", "little")
            with pytest.raises(LookupError, match="no shared memory region 4"):
                await transport.map_shared_memory(4)


async def test_the_loopback_has_it_too() -> None:
    device = Window()
    async with Loopback(device) as loopback:
        theirs = await loopback.map_shared_memory(5)
        theirs[:5] = b"hello"
        assert bytes(device.window.view[:5]) == b"hello"
        with pytest.raises(LookupError, match="no shared memory region 4"):
            await loopback.map_shared_memory(4)


async def test_a_port_that_cannot_map_says_so() -> None:
    class Port:
        """A port without `bar_map`."""

        def __init__(self, port: object) -> None:
            self._port = port

        def __getattr__(self, name: str) -> object:
            if name == "bar_map":
                raise AttributeError(name)
            return getattr(self._port, name)

    async with pci_port(Window(), "socket") as port:
        transport = await PciTransport.open(Port(port))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="cannot be mapped over this port"):
            await transport.map_shared_memory(5)


async def test_several_regions_share_a_bar_and_leave_no_room_for_express() -> None:
    device = Window((0, 3 * MIB), (255, 4096))
    function = VirtioPci(device)
    assert (function.config.size, VirtioPci(Window()).config.size) == (256, 4096)
    async with pci_port(device, "socket") as port:
        info = await enumerate_function(port)
        found = locate(info).shared_memory
        assert {number: (each.bar, each.offset, each.length) for number, each in found.items()} == {
            5: (2, 0, 0x1_0000),
            0: (2, 2 * MIB, 3 * MIB),
            255: (2, 5 * MIB, 4096),
        }
        bar = info.bar(2)
        assert bar is not None
        assert (bar.size, bar.kind, bar.prefetchable) == (8 * MIB, "mem64", True)


def test_addresses_beyond_4_gib_have_their_upper_halves() -> None:
    device = Window((1, 6 << 30))
    guest = Guest(VirtioPci(device))
    at, bar, offset, length = guest.virtio_structures()[CfgType.SHARED_MEMORY]
    assert (guest.config(at + 2, 1), guest.config(at + 5, 1), bar, offset, length) == (24, 1, 2, 2 * MIB, 0x8000_0000)
    assert (guest.config(at + 16, 4), guest.config(at + 20, 4)) == (0, 1)
    assert guest.function.region_info(2).size == 8 << 30


async def test_a_successor_has_the_same_memory() -> None:
    old, new = Window(), Window()
    async with Loopback(old) as loopback:
        old.window.view[:4] = b"kept"
        with pytest.raises(AuthorError, match="shared memory regions"):
            await loopback.core.replace(Window((6, 4096)))
        await loopback.core.replace(new)
        assert bytes(new.window.view[:4]) == b"kept"
        assert bytes((await loopback.map_shared_memory(5))[:4]) == b"kept"


async def test_what_is_no_longer_served_is_not_mapped() -> None:
    function = VirtioPci(Window())
    assert function.region_info(2).flags & RegionFlags.MMAP
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    info = function.region_info(2)
    assert (info.fds, info.flags & RegionFlags.MMAP) == ((), RegionFlags(0))
