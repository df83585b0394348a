"""The engine over the double and, where it is found, over the real library: clients that speak byte by byte."""

import errno
import logging
import os
import socket
import stat
import struct
from pathlib import Path

import pytest
import trio
from support.hosted_echo import HostedEcho
from support.library_client import (
    DISCONNECTED,
    PAGE,
    Connect,
    dma_map,
    events,
    negotiate,
    read,
    set_irqs,
    until,
    write,
)

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.libvfio_user import LibraryListener, LibvfioUserServer, attach, hosted
from vfiouser_virtio.libvfio_user.bindings import HasFunctions
from vfiouser_virtio.protocols.vfio_user import Command, IrqSetFlags, PciIrq
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import AnswerLater, Hold
from vfiouser_virtio.vfio_user import ListenError, listen_path

# ---- regions ---------------------------------------------------------------------------------------------------------


async def test_what_is_written_is_read(client: RawClient, device: HostedEcho) -> None:
    for index, offset in ((0, 0), (4, 0x3FFC), (7, 0x40)):
        assert await write(client, index, offset, b"\1\2\3\4") == 0
        assert await read(client, index, offset, 4) == b"\1\2\3\4"
    assert device.names()[0] == "connected"
    assert device.names().count("region_read") == 3


async def test_an_answer_that_was_to_come_later_comes_at_once(
    client: RawClient, device: HostedEcho, caplog: pytest.LogCaptureFixture
) -> None:
    hold = Hold()
    device.bug = AnswerLater(hold, b"late")
    for _ in range(2):
        assert await read(client, 0, 0, 4) == b"late"
    device.bug = AnswerLater(Hold(on_expire=lambda: answer.append(b"over")), lambda: answer[-1])
    answer = [b"none"]
    assert await read(client, 0, 0, 4) == b"over", "the device is told that nothing waits"
    said = [record.getMessage() for record in caplog.records if "libvfio-user cannot wait" in record.getMessage()]
    assert len(said) == 1


async def test_sizes_and_interrupts_are_the_functions(client: RawClient) -> None:
    def fields(layout: str, reply: bytes) -> tuple[int, ...]:
        return struct.unpack_from(layout, reply)

    sizes = []
    for index in range(9):
        reply = await client.call(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        sizes.append(fields("<IIIIQQ", reply.body)[4])
    assert sizes == [0x4000, 0, 0, 0, 0x4000, 0, 0, 256, 0]
    counts = []
    for index in range(3):
        reply = await client.call(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        counts.append(fields("<IIII", reply.body)[3])
    assert counts == [1, 0, 32]


async def test_a_refusal_is_the_clients_errno_and_logged_once(
    client: RawClient, device: HostedEcho, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.bug = PeerError("not here", errno.EPERM)
    for _ in range(3):
        reply = await client.call(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))
        assert reply.error == errno.EPERM
    assert sum("not here" in record.getMessage() for record in caplog.records) == 1
    device.bug = None
    assert await read(client, 0, 0, 4) == bytes(4)


async def test_a_bug_of_the_device_is_eio_and_logged_with_its_traceback(
    client: RawClient, device: HostedEcho, caplog: pytest.LogCaptureFixture
) -> None:
    device.bug = ZeroDivisionError("oops")
    for _ in range(3):
        reply = await client.call(Command.REGION_READ, struct.pack("<QII", 0, 0, 4))
        assert reply.error == errno.EIO
    (record,) = [record for record in caplog.records if "bug of the device" in record.getMessage()]
    assert record.exc_info is not None
    device.bug = None
    assert await read(client, 0, 0, 4) == bytes(4)


# ---- clients ---------------------------------------------------------------------------------------------------------


async def test_one_client_after_another_finds_the_devices_state(
    client: RawClient, device: HostedEcho, connect: Connect
) -> None:
    held = []
    for number in range(5):
        await write(client, 0, number, b"x")
        client.close()
        client = connect()  # at once: the server may not have noticed yet that the first one is gone
        await negotiate(client)
        assert await read(client, 0, 0, number + 1) == b"x" * (number + 1)
        held.append(len(os.listdir("/proc/self/fd")))
    assert len(set(held)) == 1
    told = [name for name in device.names() if "connected" in name]
    assert told == ["connected", "disconnected"] * 5 + ["connected"]


async def test_a_second_client_is_refused_at_once_and_logged(
    client: RawClient, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with trio.fail_after(60):
            await connect().no_more()
    assert await read(client, 0, 0, 1) == b"\0"
    assert sum("refused another client" in record.getMessage() for record in caplog.records) == 3


async def test_a_client_that_is_not_understood_is_logged_and_the_next_one_served(
    nursery: trio.Nursery,
    device: HostedEcho,
    listener: LibraryListener,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger = connect()
    await stranger.send(b"GET / HTTP/1.1\r\n\r\n")
    nursery.start_soon(LibvfioUserServer(device).serve, listener)
    await stranger.no_more()
    client = connect()
    await negotiate(client)
    assert any("not understood" in record.getMessage() for record in caplog.records)
    assert device.names() == ["connected"]


async def test_a_client_that_says_nothing_is_hung_up_on(
    nursery: trio.Nursery,
    device: HostedEcho,
    listener: LibraryListener,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library waits for it, with all else at a standstill."""
    monkeypatch.setattr(attach, "TIMEOUT", 0.1)
    silent = connect()
    nursery.start_soon(LibvfioUserServer(device).serve, listener)
    with trio.fail_after(60):
        await silent.no_more()
    client = connect()
    await negotiate(client)
    assert device.names() == ["connected"]


async def test_several_devices_in_one_process(library: HasFunctions, nursery: trio.Nursery, tmp_path: Path) -> None:
    functions, clients = [HostedEcho() for _ in range(3)], []
    for number, device in enumerate(functions):
        listener = LibraryListener(tmp_path / f"{number}.sock")
        listener.open(library)
        nursery.start_soon(LibvfioUserServer(device).serve, listener)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(listener.name)
        clients.append(RawClient(sock))
        await negotiate(clients[-1])
    for number, client in enumerate(clients):
        await write(client, 0, 0, bytes([number]))
    assert [device.regions[0][0] for device in functions] == [0, 1, 2]
    for client in clients:
        client.close()
    nursery.cancel_scope.cancel()


async def test_once_serves_one_client(
    nursery: trio.Nursery, device: HostedEcho, listener: LibraryListener, connect: Connect
) -> None:
    ended = trio.Event()

    async def serve() -> None:
        await LibvfioUserServer(device).serve(listener, once=True)
        ended.set()

    nursery.start_soon(serve)
    client = connect()
    await negotiate(client)
    client.close()
    with trio.fail_after(60):
        await ended.wait()
    assert not os.path.exists(listener.name)
    assert device.names() == ["connected", "quiesce", "disconnected"]


async def test_cancelling_tells_the_device_and_leaves_nothing(
    library: HasFunctions, device: HostedEcho, tmp_path: Path, memfd: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        listener = LibraryListener(tmp_path / "vu.sock")
        listener.open(library)
        nursery.start_soon(LibvfioUserServer(device).serve, listener)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(listener.name)
        client = RawClient(sock)
        await negotiate(client)
        assert await dma_map(client, 0x10000, 4 * PAGE, memfd) == 0
        nursery.cancel_scope.cancel()
    client.close()
    assert device.calls[-2:] == [("dma_unmap", 0x10000, 4 * PAGE), DISCONNECTED]
    assert device.trigger is None
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


# ---- interrupts ------------------------------------------------------------------------------------------------------


async def test_interrupts_go_through_the_library(client: RawClient, device: HostedEcho, eventfd: int) -> None:
    assert device.trigger is not None
    assert device.trigger(2) is False
    assert await set_irqs(client, PciIrq.MSIX, 0x24, 2, 1, (eventfd,)) == 0
    assert device.trigger(2) is True
    assert device.trigger(1) is False
    assert events(eventfd) == 1


async def test_what_nobody_took_is_tried_again_when_an_eventfd_has_come(
    client: RawClient, device: HostedEcho, eventfd: int
) -> None:
    tries: list[bool] = []

    def retry() -> None:
        assert device.trigger is not None
        tries.append(device.trigger(0))

    assert device.trigger is not None
    assert device.trigger(0) is False
    device.on_retry = retry
    for _ in range(3):
        await read(client, 0, 0, 4)
    assert tries == []  # an access brings no eventfd
    assert await set_irqs(client, PciIrq.MSIX, 0x24, 0, 1, (eventfd,)) == 0
    await until(lambda: tries)
    assert tries == [True]
    assert events(eventfd) == 1


async def test_intx_is_masked_and_unmasked(client: RawClient, device: HostedEcho) -> None:
    assert await set_irqs(client, PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK, 0, 1) == 0
    assert await set_irqs(client, PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, 0, 1) == 0
    masked, unmasked = [call for call in device.calls if call[0] == "set_irqs"]
    assert masked[1:5] == (PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK, 0, 1)
    assert unmasked[2] == IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK


# ---- the socket ------------------------------------------------------------------------------------------------------


def test_only_the_owner_may_connect(listener: LibraryListener) -> None:
    assert stat.S_IMODE(os.stat(listener.name).st_mode) == 0o600


def test_a_dead_servers_socket_is_replaced(library: HasFunctions, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "vu.sock"))
    with LibraryListener(tmp_path / "vu.sock") as listener:
        listener.open(library)
    assert list(tmp_path.iterdir()) == []


def test_a_living_servers_is_not(library: HasFunctions, listener: LibraryListener, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="another server does"):
        LibraryListener(listener.name)
    with listen_path(tmp_path / "ours.sock"), pytest.raises(ListenError, match="another server does"):
        LibraryListener(tmp_path / "ours.sock")
    (tmp_path / "file").touch()
    with pytest.raises(ListenError, match="not a socket"):
        LibraryListener(tmp_path / "file")


@pytest.mark.parametrize("length", [107, 108])
def test_the_path_may_have_107_bytes(library: HasFunctions, length: int) -> None:
    folder = os.open("/tmp", os.O_PATH)
    path = f"/proc/self/fd/{folder}/vu-test-{os.getpid()}-".ljust(length, "x")
    try:
        if length > 107:
            with pytest.raises(ListenError, match="108 bytes, the system allows 107"):
                LibraryListener(path)
        else:
            with LibraryListener(path) as listener:
                listener.open(library)
    finally:
        os.close(folder)


def test_more_regions_than_the_process_can_map_are_refused() -> None:
    assert 3 * hosted.MAX_DMA_MAPS < 65530


def test_the_log_names_who_it_is_about(caplog: pytest.LogCaptureFixture, listener: LibraryListener) -> None:
    caplog.set_level(logging.DEBUG)
    device = hosted.HostedDevice(listener.context, HostedEcho(), "echo")
    listener.context.log(3, "something is wrong with 0x17")
    listener.context.log(3, "something is wrong with 0x18")
    listener.context.log(3, "no fd for interrupt 5")
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == ["echo: libvfio-user: something is wrong with 0x17"]
    device.gone()
