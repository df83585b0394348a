"""A client's commands: registers, many requests at a time, information about the device, memory."""

import errno
import os
import struct
from collections.abc import Callable

import pytest
import trio
from support.echo_device import EchoDevice

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import Command, Direction, PciIrq, PciRegion, RegionFlags
from vfiouser_virtio.vfio_device import Hold, IoEventFd
from vfiouser_virtio.vfio_user import (
    SPDK_OPTIONS,
    TWIN_VERSION,
    Client,
    ClientOptions,
    Message,
    PrivateMemory,
    RemoteError,
    SharedMemory,
)
from vfiouser_virtio.vfio_user import connect as connect_to

# Asking

MIB = 1 << 20


async def test_what_there_is(echo: Client) -> None:
    info = await echo.device_info()
    assert (info.flags, info.num_regions, info.num_irqs) == (3, 9, 5)
    region = await echo.region_info(4)
    assert (region.size, region.flags) == (0x4000, RegionFlags.READ | RegionFlags.WRITE)
    assert (await echo.region_info(3)).size == 0
    irqs = await echo.irq_info(PciIrq.MSIX)
    assert (irqs.flags, irqs.count) == (1, 32)


async def test_registers(echo: Client, device: EchoDevice) -> None:
    await echo.bar_write(4, 0x10, 4, 0x11223344)
    assert device.regions[4][0x10:0x14] == b"\x44\x33\x22\x11"
    assert await echo.bar_read(4, 0x11, 2) == 0x2233
    echo.bar_post(4, 0x18, 8, 1 << 63)
    assert await echo.bar_read(4, 0x18, 8) == 1 << 63
    await echo.config_write(0x3C, 1, 0xFE)
    assert await echo.config_read(0x3C, 2) == 0xFE
    assert await echo.region_read(PciRegion.CONFIG, 0, 256) == bytes(0x3C) + b"\xfe" + bytes(0xC3)


async def test_large_accesses(echo: Client, device: EchoDevice) -> None:
    device.regions[0] = bytearray(MIB)
    data = os.urandom(MIB)
    await echo.region_write(0, 0, data)
    assert await echo.region_read(0, 0, MIB) == data


async def test_posted_writes_are_in_order_and_many(echo: Client, device: EchoDevice) -> None:
    for number in range(20_000):
        echo.bar_post(0, 0, 4, number)
    assert await echo.bar_read(0, 0, 4) == 19_999
    writes = [call[3] for call in device.calls if call[0] == "region_write"]
    assert writes == [struct.pack("<I", number) for number in range(20_000)]


async def test_posts_before_the_end_are_flushed(server: str, device: EchoDevice) -> None:
    device.regions[0] = bytearray(MIB)
    async with connect_to(server) as client:
        for number in range(4):
            client.region_post(0, 0, bytes([number]) * MIB)
        await client.flush()
    with trio.fail_after(60):
        while "disconnected" not in device.names():
            await trio.sleep(0.001)
    assert device.regions[0] == b"\3" * MIB


async def test_several_writes_in_one_message(echo: Client, device: EchoDevice) -> None:
    assert await echo.region_write_multi([(0, 8, b"abc"), (4, 0, b"12345678")]) == 2
    echo.post_write_multi([(0, 0, b"z")])
    assert await echo.region_read(0, 0, 12) == b"z\0\0\0\0\0\0\0abc\0"
    assert device.regions[4][:8] == b"12345678"
    with pytest.raises(ValueError, match="1 to 8"):
        await echo.region_write_multi([(0, 0, bytes(9))])
    with pytest.raises(RemoteError):
        await echo.region_write_multi([(0, 0x4000, b"x")])


async def test_a_refusal(echo: Client, device: EchoDevice) -> None:
    with pytest.raises(RemoteError, match="REGION_READ: the server answered Invalid argument") as caught:
        await echo.bar_read(4, 0x4000, 1)
    assert (caught.value.errno, caught.value.command) == (errno.EINVAL, Command.REGION_READ)
    with pytest.raises(OSError, match="command 0x2a") as unknown:
        await echo.request(42)
    assert unknown.value.errno == errno.ENOSYS
    reply = await echo.exchange(42, b"payload")
    assert (reply.error, reply.payload, reply.flags) == (errno.ENOSYS, b"", 0x21)
    assert echo.alive


async def test_pipelining(echo: Client, device: EchoDevice) -> None:
    device.regions[0][:] = bytes(index & 0xFF for index in range(0x4000))
    found: dict[int, int] = {}

    async def read(offset: int) -> None:
        found[offset] = await echo.bar_read(0, offset, 1)

    async with trio.open_nursery() as nursery:
        for offset in range(500):
            nursery.start_soon(read, offset)
    assert found == {offset: offset & 0xFF for offset in range(500)}


async def test_a_timeout_and_the_late_reply(echo: Client, device: EchoDevice) -> None:
    device.hold = hold = Hold()
    echo.timeout = 0.05
    with pytest.raises(PeerError, match=r"DEVICE_RESET: no reply within 0\.05 s") as caught:
        await echo.device_reset()
    assert caught.value.errno == errno.ETIMEDOUT
    hold.finish()
    echo.timeout = 60
    assert await echo.bar_read(0, 0, 4) == 0
    await echo.device_reset()


async def test_headers_as_they_should_not_be(echo: Client) -> None:
    payload = struct.pack("<QII", 0, 0, 4)
    assert (await echo.exchange(Command.REGION_READ, payload, message_id=0xFFFF)).payload == payload + bytes(4)
    with pytest.raises(PeerError, match="no reply"):
        await echo.exchange(Command.REGION_READ, payload, flags=0x10, timeout=0.05)
    with pytest.raises(PeerError) as caught:
        await echo.exchange(Command.REGION_READ, payload, size=15)
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(PeerError, match="server closed"):
        echo.bar_post(0, 0, 1, 0)


async def test_raw_bytes(echo: Client, device: EchoDevice) -> None:
    echo.send_raw(struct.pack("<HHIII", 1, Command.REGION_WRITE, 33, 0x10, 0))
    echo.send_raw(struct.pack("<QII", 5, 0, 1) + b"!")
    assert await echo.bar_read(0, 5, 1) == ord("!")


async def test_which_ids_are_used(server: str) -> None:
    seen: list[tuple[Direction, int, int]] = []

    def trace(direction: Direction, message: Message) -> None:
        seen.append((direction, message.id, message.command))

    to, back = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    for next_id, ids in ((None, [0, 1]), (iter([7, 0xFFFF]).__next__, [7, 0xFFFF]), (lambda: 0, [0, 0])):
        seen.clear()
        async with connect_to(server, options=ClientOptions(next_id=next_id, trace=trace)) as client:
            await client.device_info()
        commands = [Command.VERSION, Command.DEVICE_GET_INFO]
        assert seen == [(way, i, c) for i, c in zip(ids, commands, strict=True) for way in (to, back)]


async def test_pipelining_with_one_id(server: str, device: EchoDevice) -> None:
    device.regions[0][:64] = bytes(range(64))
    async with connect_to(server, options=SPDK_OPTIONS) as client:
        found: list[int] = []

        async def read(offset: int) -> None:
            found.append(await client.bar_read(0, offset, 1))

        async with trio.open_nursery() as nursery:
            for offset in range(64):
                nursery.start_soon(read, offset)
        assert sorted(found) == list(range(64))


# Regions with more to say


async def test_capabilities_of_a_region(echo: Client, device: EchoDevice, open_fds: Callable[[], int]) -> None:
    areas = struct.pack("<IIQQ", 1, 0, 0x1000, 0x1000)
    device.capabilities[4] = ((1, 1, areas), (3, 1, b""))
    fd = os.memfd_create("bar")
    device.region_fds[4] = (fd,)
    before = open_fds()
    info = await echo.region_info(4)
    assert info.flags == RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP | RegionFlags.CAPS
    assert info.capabilities == ((1, 1, areas), (3, 1, b""))
    assert len(info.fds) == 1
    assert os.path.samestat(os.fstat(info.fds[0]), os.fstat(fd))
    assert open_fds() == before + 1  # those of the first round are closed
    assert (await echo.region_info(4, argsz=4064)).capabilities == info.capabilities
    echo.close()
    assert open_fds() == before - 1  # its socket, too
    os.close(fd)


async def test_a_region_capability_of_tomorrow_is_passed_over(
    echo: Client, device: EchoDevice, open_fds: Callable[[], int]
) -> None:
    """0x8001 comes with `sparse_mmap_fds`, and with several fds a region: what is known beside it still counts."""
    areas = struct.pack("<IIQQ", 1, 0, 0x1000, 0x1000)
    unknown = struct.pack("<IIQQQ", 1, 0, 0, 0x1000, 0)
    fds = [os.memfd_create("bar") for _ in range(3)]
    device.region_fds[4] = tuple(fds)
    before = open_fds()
    for chain in (((0x8001, 1, unknown), (1, 1, areas)), ((1, 1, areas), (0x8001, 1, unknown)), ((0x8001, 7, b""),)):
        device.capabilities[4] = chain
        info = await echo.region_info(4)
        assert info.capabilities == chain
        assert len(info.fds) == 3
        assert await echo.region_read(4, 0, 4)
    echo.close()
    assert open_fds() == before - 1, "all of the fds that came are closed, and the socket"
    for fd in fds:
        os.close(fd)


async def test_io_fds(echo: Client, device: EchoDevice) -> None:
    assert await echo.io_fds(0) == []
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    device.io = [
        IoEventFd(0x3000, 2, fds[0]),
        IoEventFd(0x3004, 0, fds[1]),
        IoEventFd(0x3008, 4, fds[2], flags=1, datamatch=7),
    ]
    entries = await echo.io_fds(4)
    assert [(e.offset, e.size, e.flags, e.datamatch) for e in entries] == [
        (0x3000, 2, 0, 0),
        (0x3004, 0, 0, 0),
        (0x3008, 4, 1, 7),
    ]
    assert await echo.use_io_fds(4) == 3
    echo.bar_post(4, 0x3000, 2, 0)
    echo.bar_post(4, 0x3004, 1, 0)
    echo.bar_post(4, 0x3004, 8, 0)
    echo.bar_post(4, 0x3008, 4, 7)
    assert [os.eventfd_read(fd) for fd in fds] == [1, 2, 1]
    for bar, offset, size, value in ((4, 0x3000, 4, 0), (4, 0x3008, 4, 8), (0, 0x3000, 2, 0), (4, 0x3002, 2, 0)):
        echo.bar_post(bar, offset, size, value)
    await echo.bar_read(4, 0, 1)
    assert device.names().count("region_write") == 4
    for fd in fds:
        os.close(fd)


# Memory


@pytest.mark.parametrize("kind", [SharedMemory, PrivateMemory])
async def test_memory_is_mapped(
    server: str, device: EchoDevice, kind: type[SharedMemory] | type[PrivateMemory]
) -> None:
    with kind(MIB) as first, kind(4096, address=0) as second:
        async with connect_to(server, memory=[first, second]) as client:
            assert client.memory is first
            has_fd = kind is SharedMemory
            assert device.calls[1:] == [
                ("dma_map", 0x1_0000_0000, MIB, True, True, has_fd, 0),
                ("dma_map", 0, 4096, True, True, has_fd, 0),
            ]
            await client.unmap_memory(first)
            assert client.memory is second
            await client.unmap_memory(second)
            with pytest.raises(LookupError, match="no memory is mapped"):
                _ = client.memory
            await client.map_memory(first, writable=False)
            assert device.calls[-1] == ("dma_map", 0x1_0000_0000, MIB, True, False, has_fd, 0)
            with pytest.raises(RemoteError) as caught:
                await client.map_memory(first)
            assert caught.value.errno == errno.EEXIST
            await client.dma_unmap(0, 0, flags=2)
            last: object = device.calls[-1]
            assert last == ("dma_unmap", 0, 1 << 64)


@pytest.mark.parametrize("options", [ClientOptions(), ClientOptions(version=TWIN_VERSION)], ids=["one", "twin"])
async def test_the_server_reaches_memory_by_message(server: str, device: EchoDevice, options: ClientOptions) -> None:
    with PrivateMemory(MIB) as ram:
        async with connect_to(server, options=options, memory=[ram]) as client:
            assert device.client is not None
            data = os.urandom(100_000)
            await device.client.dma_write(ram.address + 5, data)
            assert bytes(ram.view[5 : 5 + len(data)]) == data
            assert await device.client.dma_read(ram.address + 5, len(data)) == data
            with pytest.raises(PeerError, match="No such device") as caught:
                await device.client.dma_read(ram.address + MIB - 1, 2)
            assert caught.value.errno == errno.ENODEV
            await client.unmap_memory(ram)
            with pytest.raises(PeerError):
                await device.client.dma_read(ram.address, 1)


async def test_memory_is_served_while_we_wait(server: str, device: EchoDevice, nursery: trio.Nursery) -> None:
    """A device that cannot finish its reset before it has read our memory."""
    with PrivateMemory(MIB) as ram:
        async with connect_to(server, memory=[ram]) as client:
            device.hold = hold = Hold()

            async def work() -> None:
                assert device.client is not None
                await device.client.dma_write(ram.address, b"done")
                hold.finish()

            nursery.start_soon(work)
            await client.device_reset()
            assert bytes(ram.view[:4]) == b"done"


async def test_memory_outlives_a_client(server: str) -> None:
    with SharedMemory(MIB) as ram:
        for _ in range(3):
            async with connect_to(server, memory=[ram]):
                pass
