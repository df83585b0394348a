"""What docs/libvfio-user.md says that the library does not do, shown on the real one: a limit that has gone is told.

Those that break a rule of vfio-user are in test_conformance.py.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from support.hosted_echo import HostedEcho

from vfiouser_virtio.libvfio_user import Library, LibraryListener, LibvfioUserServer, attach, hosted
from vfiouser_virtio.libvfio_user import client as library_client
from vfiouser_virtio.libvfio_user.bindings import MAX_DMA_REGIONS, Context, RegionFlag
from vfiouser_virtio.protocols.vfio_user import IOEVENTFD, Command, PciIrq
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import Hold, IoEventFd

PAGE = 4096


@pytest.fixture
def device() -> HostedEcho:
    return HostedEcho()


@pytest.fixture
async def client(
    nursery: trio.Nursery, libvfio_user: Library, device: HostedEcho, tmp_path: Path
) -> AsyncIterator[RawClient]:
    listener = LibraryListener(tmp_path / "vu.sock")
    listener.open(libvfio_user)
    nursery.start_soon(LibvfioUserServer(device).serve, listener)
    client = connected(listener.name)
    assert (await client.version()).error == 0
    yield client
    client.close()
    nursery.cancel_scope.cancel()


def connected(path: str) -> RawClient:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    return RawClient(sock)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("client")
    os.ftruncate(fd, 256 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    yield fds
    for fd in fds:
        os.close(fd)


async def dma(client: RawClient, command: Command, address: int, pages: int, fd: int | None = None) -> int:
    if command == Command.DMA_MAP:
        payload = struct.pack("<IIQQQ", 32, 3, 0, address, pages * PAGE)
    else:
        payload = struct.pack("<IIQQ", 24, 0, address, pages * PAGE)
    reply = await client.call(command, payload, [] if fd is None else [fd])
    return int(reply.error)


async def set_irqs(client: RawClient, index: int, flags: int, start: int, fds: list[int]) -> int:
    payload = struct.pack("<IIIII", 20, flags, index, start, len(fds) or 1)
    reply = await client.call(Command.DEVICE_SET_IRQS, payload, fds)
    return int(reply.error)


def events(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def test_region_write_multi_is_unknown(client: RawClient) -> None:
    write = struct.pack("<QII", 0, 0, 4) + bytes(8)
    reply = await client.call(Command.REGION_WRITE_MULTI, struct.pack("<Q", 1) + write)
    assert reply.error == errno.EINVAL


async def test_unmap_takes_only_what_one_map_has_brought(client: RawClient, device: HostedEcho, memfd: int) -> None:
    for address in (0x10000, 0x10000 + PAGE):
        assert await dma(client, Command.DMA_MAP, address, 1, memfd) == 0
    assert await dma(client, Command.DMA_UNMAP, 0x10000, 2) == errno.ENOENT
    assert await dma(client, Command.DMA_UNMAP, 0x20000, 1) == errno.ENOENT
    assert "dma_unmap" not in device.names()
    for address in (0x10000, 0x10000 + PAGE):
        assert await dma(client, Command.DMA_UNMAP, address, 1) == 0


async def test_memory_without_a_file_descriptor_is_not_reached(client: RawClient, device: HostedEcho) -> None:
    """DMA_READ by the library takes whatever comes next for the answer, unless there is a twin socket: see bindings."""
    assert await dma(client, Command.DMA_MAP, 0x10000, 1) == 0
    assert device.aliases == {}


async def test_a_file_that_is_too_short_is_mapped_all_the_same(
    client: RawClient, device: HostedEcho, memfd: int
) -> None:
    """By the library alone: `GuestMemory.map_alias` refuses it (tests/test_memory_alias.py)."""
    assert await dma(client, Command.DMA_MAP, 0x100000, 257, memfd) == 0
    assert ("dma_map_alias", 0x100000, 257 * PAGE, True, True, PAGE) in device.calls


async def test_regions_are_not_limited_to_64(client: RawClient, device: HostedEcho, memfd: int) -> None:
    for number in range(100):
        assert await dma(client, Command.DMA_MAP, 0x100000 + number * PAGE, 1, memfd) == 0
    assert len(device.aliases) == 100
    assert hosted.MAX_DMA_MAPS < MAX_DMA_REGIONS


async def test_regions_are_limited_by_us(
    libvfio_user: Library, nursery: trio.Nursery, tmp_path: Path, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted, "MAX_DMA_MAPS", 2)
    listener = LibraryListener(tmp_path / "vu.sock")
    listener.open(libvfio_user)
    nursery.start_soon(LibvfioUserServer(HostedEcho()).serve, listener)
    client = connected(listener.name)
    await client.version()
    answers = [await dma(client, Command.DMA_MAP, 0x10000 * number, 1, memfd) for number in range(1, 4)]
    assert answers == [0, 0, errno.EINVAL]
    client.close()
    nursery.cancel_scope.cancel()


async def test_intx_is_not_announced_as_maskable(client: RawClient) -> None:
    reply = await client.call(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, PciIrq.INTX, 0))
    assert struct.unpack("<IIII", reply.body)[1] == 1, "EVENTFD, without MASKABLE and AUTOMASKED"


async def test_a_resample_eventfd_is_taken_and_forgotten(
    client: RawClient, device: HostedEcho, eventfds: list[int]
) -> None:
    """As KVM's INTx wants it: the guest's end of interrupt is signalled there, and nobody listens."""
    assert await set_irqs(client, PciIrq.INTX, 0x14, 0, eventfds[:1]) == 0
    unmasked = [call for call in device.calls if call[0] == "set_irqs"]
    assert len(unmasked) == 1
    os.eventfd_write(eventfds[0], 1)
    await trio.sleep(0.05)
    assert events(eventfds[0]) == 1
    assert [call for call in device.calls if call[0] == "set_irqs"] == unmasked


async def test_one_vector_cannot_be_taken_away(client: RawClient, device: HostedEcho, eventfds: list[int]) -> None:
    """All of MSI-X can, which is what QEMU does."""
    assert device.trigger is not None
    assert await set_irqs(client, PciIrq.MSIX, 0x24, 0, eventfds) == 0
    assert await set_irqs(client, PciIrq.MSIX, 0x24, 2, []) == 0
    assert device.trigger(2) is True
    payload = struct.pack("<IIIII", 20, 0x21, PciIrq.MSIX, 0, 0)
    assert (await client.call(Command.DEVICE_SET_IRQS, payload)).error == 0
    assert [device.trigger(vector) for vector in range(3)] == [False] * 3


async def test_ioeventfds_are_not_offered_for_their_entries_are_too_long(
    client: RawClient, device: HostedEcho, libvfio_user: Library, tmp_path: Path, eventfds: list[int]
) -> None:
    device.io = [IoEventFd(0, 4, eventfds[0])]
    ask = struct.pack("<IIII", 4096, 0, 4, 0)
    assert struct.unpack("<IIII", (await client.call(Command.DEVICE_GET_REGION_IO_FDS, ask)).body) == (16, 0, 4, 0)
    with Context(libvfio_user, tmp_path / "raw.sock") as context:
        context.setup_region(4, 4096, None, RegionFlag.RW)
        context.create_ioeventfd(4, eventfds[0], 0, 4)
        context.realize_ctx()
        other = connected(context.name)
        await other.send(other.request(Command.VERSION, struct.pack("<HH", 0, 0)))
        assert context.attach_ctx()
        await other.receive()
        await other.send(other.request(Command.DEVICE_GET_REGION_IO_FDS, ask))
        context.run_ctx()
        reply = await other.receive()
        other.close()
    for fd in reply.fds:
        os.close(fd)
    assert len(reply.body) - 16 == 48 > IOEVENTFD.sizeof()


async def test_device_feature_is_einval(client: RawClient) -> None:
    assert (await client.call(Command.DEVICE_FEATURE, struct.pack("<II", 8, 1 << 16 | 1))).error == errno.EINVAL


async def test_a_silent_client_stops_the_process_but_not_for_long(
    client: RawClient,
    libvfio_user: Library,
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attach, "TIMEOUT", 0.5)
    listener = LibraryListener(tmp_path / "other.sock")
    listener.open(libvfio_user)
    silent = connected(listener.name)
    nursery.start_soon(LibvfioUserServer(HostedEcho()).serve, listener)
    started = time.monotonic()
    await trio.sleep(0.01)
    await client.call(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))
    assert 0.4 < time.monotonic() - started < 60
    silent.close()


async def test_half_a_message_stops_the_process_but_not_for_long(
    client: RawClient,
    libvfio_user: Library,
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_client, "STALL", 0.5)
    listener = LibraryListener(tmp_path / "other.sock")
    listener.open(libvfio_user)
    nursery.start_soon(LibvfioUserServer(HostedEcho()).serve, listener)
    slow = connected(listener.name)
    await slow.version()
    message = slow.request(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))
    await slow.send(message[:16])
    started = time.monotonic()
    await trio.sleep(0.01)
    await client.call(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))
    assert 0.3 < time.monotonic() - started < 60
    slow.close()


async def test_a_reset_is_answered_before_its_end(client: RawClient, device: HostedEcho) -> None:
    """Nothing touches memory any more by then, and the next request waits: test_server.py."""
    device.hold = hold = Hold()
    assert (await client.call(Command.DEVICE_RESET)).error == 0
    assert not hold.done
    hold.finish()


def test_a_socket_of_others_cannot_be_used(libvfio_user: Library, tmp_path: Path) -> None:
    """It binds its own, and does not even replace a stale one."""
    path = tmp_path / "vu.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(OSError, match="in use"):
        Context(libvfio_user, path)
