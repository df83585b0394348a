"""The client against servers that break the protocol: a clear error, and nothing left behind."""

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio.testing

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command, PciRegion
from vfiouser_virtio.testing.raw.client import RawClient, RawMessage
from vfiouser_virtio.vfio_user import QEMU_OPTIONS, TWIN_VERSION, Client, ClientOptions, PrivateMemory
from vfiouser_virtio.vfio_user import connect as connect_to
from vfiouser_virtio.vfio_user.client.connection import MAX_UNREAD

LENIENT = ClientOptions(version=None)
STRICT = ClientOptions(version=None, strict=True)


class FakeServer(RawClient):
    """The other end of the socket: `receive` is what the client asked, `answer` answers that."""

    async def answer(
        self,
        payload: bytes = b"",
        *,
        flags: int = 1,
        error: int = 0,
        fds: tuple[int, ...] = (),
        size: int | None = None,
    ) -> RawMessage:
        """Wait for a request, and answer it."""
        request = await self.receive()
        size = 16 + len(payload) if size is None else size
        await self.send(HEADER_CODEC.pack(request.id, request.command, size, flags, error) + payload, fds)
        return request

    async def answer_all(self, *payloads: bytes) -> None:
        """`answer` one request after the other."""
        for payload in payloads:
            await self.answer(payload)

    async def answer_twin(self, twin: socket.socket) -> None:
        """`answer` VERSION, with a twin socket."""
        await self.answer(version(b'{"twin_socket": {"supported": true, "fd_index": 0}}'), fds=(twin.fileno(),))


@asynccontextmanager
async def talking(options: ClientOptions = LENIENT) -> AsyncIterator[tuple[Client, FakeServer, trio.Nursery]]:
    """A client, its server, and where the server's part of the conversation runs."""
    ours, theirs = socket.socketpair()
    server = FakeServer(theirs)
    try:
        async with trio.open_nursery() as nursery, connect_to(ours, options=options) as client:
            yield client, server, nursery
    finally:
        server.close()


async def fails(client: Client, text: str, *, ends: bool, number: int = errno.EPROTO) -> None:
    """Reading a register raises PeerError."""
    with pytest.raises(PeerError, match=text) as caught:
        await client.bar_read(0, 0, 4)
    assert (caught.value.errno, caught.value.fatal) == (number, ends and number == errno.EPROTO)
    assert client.alive != ends


GOOD = struct.pack("<QII", 0, 0, 4)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "0x0 bytes of payload"),
        (GOOD, "data bytes of 0x0, 0x4"),
        (GOOD + b"123", "data bytes of 0x3"),
        (GOOD + b"12345", "data bytes of 0x5"),
        (struct.pack("<QII", 1, 0, 4) + b"1234", "offset 0x1, 0x0"),
        (struct.pack("<QII", 0, 1, 4) + b"1234", "region 0x1, 0x0"),
        (struct.pack("<QII", 0, 0, 5) + b"1234", "count 0x5, 0x4"),
    ],
)
async def test_an_answer_to_something_else(reply: bytes, text: str) -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer, reply)
        await fails(client, text, ends=False)
        nursery.start_soon(server.answer, GOOD + b"\x04\x03\x02\x01")
        assert await client.bar_read(0, 0, 4) == 0x01020304


async def test_fds_that_nobody_has_asked_for() -> None:
    """They are not kept."""
    async with talking() as (client, server, nursery):
        theirs = os.pipe()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            nursery.start_soon(partial(server.answer, GOOD + bytes(4), fds=theirs))
            assert await client.bar_read(0, 0, 4) == 0
        assert len(os.listdir("/proc/self/fd")) == before
        close_all(theirs)


async def test_a_reply_larger_than_qemus_room() -> None:
    async with talking(STRICT) as (client, server, nursery):
        nursery.start_soon(server.answer, GOOD + b"12345")
        await fails(client, "QEMU's rule: no reply is larger.*0x24 bytes", ends=True)
        with pytest.raises(EOFError):
            await server.receive()


async def test_a_confirmation_in_full() -> None:
    for options in (LENIENT, STRICT):
        async with talking(options) as (client, server, nursery):
            nursery.start_soon(server.answer)
            if options.strict:
                with pytest.raises(PeerError, match="REGION_WRITE"):
                    await client.bar_write(0, 0, 4, 1)
            else:
                await client.bar_write(0, 0, 4, 1)
                nursery.start_soon(server.answer, struct.pack("<QII", 0, 0, 3))
                with pytest.raises(PeerError, match="REGION_WRITE: the reply has count 0x3, 0x4"):
                    await client.bar_write(0, 0, 4, 1)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (HEADER_CODEC.pack(0, Command.REGION_READ, 15, 1, 0), "size 0xf is below"),
        (HEADER_CODEC.pack(0, Command.REGION_READ, 1 << 31, 1, 0), "size 0x80000000 is above"),
        (HEADER_CODEC.pack(99, Command.REGION_READ, 16, 1, 0), "id 0x63, which no request has"),
        (HEADER_CODEC.pack(0, Command.DMA_MAP, 16, 1, 0), "command 0x2, not 0x9"),
        (HEADER_CODEC.pack(0, Command.REGION_READ, 16, 0x21, 0), "errno 0x0"),
        (HEADER_CODEC.pack(0, Command.REGION_READ, 16, 2, 0), "flags 0x2"),
    ],
)
async def test_a_stream_that_is_none(raw: bytes, text: str) -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.send, raw)
        await fails(client, text, ends=True)
        assert (await client.wait_closed()).fatal


async def test_an_answer_to_a_posted_write() -> None:
    async with talking() as (client, server, _nursery):
        client.bar_post(0, 0, 4, 1)
        await server.answer()
        assert "NO_REPLY" in str(await client.wait_closed())


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0\x09", HEADER_CODEC.pack(0, 9, 36, 1, 0), HEADER_CODEC.pack(0, 9, 36, 1, 0) + GOOD]
)
async def test_a_server_that_leaves_in_the_middle(sent: bytes, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    async with talking() as (client, server, nursery):

        async def leave() -> None:
            await server.receive()
            await server.send(sent)
            server.close()

        nursery.start_soon(leave)
        where = " in the middle of a message" if sent else "$"
        await fails(client, f"the server closed the connection{where}", ends=True, number=errno.ENOTCONN)
    assert open_fds() == before


async def test_writing_to_a_server_that_has_gone() -> None:
    """EPIPE, and no SIGPIPE; what the server said before it went is not lost."""
    async with talking() as (client, server, _nursery):
        server.socket.send(HEADER_CODEC.pack(0, Command.REGION_READ, 16, 0x21, errno.EIO))
        server.close()
        with pytest.raises(OSError, match="Input/output error"):
            await client.bar_read(0, 0, 4)
        with pytest.raises(PeerError, match="closed the connection"):
            await client.bar_read(0, 0, 4)


async def test_a_server_that_does_not_read() -> None:
    async with talking() as (client, server, _nursery):
        for _ in range(5000):
            client.region_post(0, 0, bytes(1000))
        client.timeout = 0.05
        await fails(client, "no reply", ends=False, number=errno.ETIMEDOUT)
        server.close()
        await client.flush()
        await client.wait_closed()


async def test_fds_nobody_asked_for(open_fds: Callable[[], int]) -> None:
    fd = os.eventfd(0)
    before = open_fds()
    async with talking() as (client, server, nursery):
        nursery.start_soon(lambda: server.answer(GOOD + b"1234", fds=(fd, fd)))
        await client.bar_read(0, 0, 4)
        nursery.start_soon(lambda: server.answer(flags=0x21, error=5, fds=(fd,)))
        with pytest.raises(OSError, match="Input/output"):
            await client.bar_read(0, 0, 4)
        await server.send(HEADER_CODEC.pack(1, 99, 16, 0, 0), (fd,))
        refused = await server.receive()
        assert (refused.flags, refused.error) == (0x21, errno.ENOSYS)
    assert open_fds() == before
    async with talking(STRICT) as (client, server, nursery):
        nursery.start_soon(lambda: server.answer(GOOD + b"1234", fds=(fd,)))
        await fails(client, "0x1 fds; QEMU's rule", ends=True)
    assert open_fds() == before
    os.close(fd)


# Region information


CAP = struct.Struct("<HHI")


def region_info(argsz: int, cap_offset: int, index: int = 4) -> bytes:
    return struct.pack("<IIIIQQ", argsz, 8, index, cap_offset, 0x1000, 0)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"x" * 31, "0x1f bytes of payload"),
        (region_info(32, 0, index=3), "index 0x3, 0x4"),
        (region_info(32, 31), "capability at 0x1f"),
        (region_info(32, 32), "capability at 0x20"),
        (region_info(40, 32) + CAP.pack(1, 1, 0x24), "capability at 0x24"),
        (region_info(40, 32) + CAP.pack(1, 1, 32), "comes back to 0x20"),
        (region_info(48, 32) + CAP.pack(1, 1, 40) + CAP.pack(1, 1, 32), "comes back to 0x20"),
        (region_info(40, 32), "argsz 0x28, but only 0x20"),
        (region_info(1 << 30, 32), "argsz 0x40000000"),
    ],
)
async def test_region_information_that_is_none(payload: bytes, text: str) -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer_all, payload, payload)
        with pytest.raises(PeerError, match=text):
            await client.region_info(4)
        nursery.cancel_scope.cancel()


async def test_capabilities_out_of_order() -> None:
    payload = region_info(64, 48) + CAP.pack(7, 2, 0) + b"first   " + CAP.pack(8, 3, 32) + b"second  "
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer_all, payload[:32], payload)
        assert (await client.region_info(4)).capabilities == ((8, 3, b"second  "), (7, 2, b"first   "))


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (struct.pack("<IIII", 56, 0, 4, 2) + bytes(40), "count 0x2 in 0x38"),
        (struct.pack("<IIII", 56, 0, 4, 1) + bytes(40), "fd_index 0x0, and 0x0 fds"),
        (struct.pack("<IIII", 56, 0, 5, 0), "index 0x5"),
        (struct.pack("<IIII", 1 << 31, 0, 4, 0), "argsz 0x80000000"),
        (b"", "0x0 bytes"),
    ],
)
async def test_io_fds_that_are_none(payload: bytes, text: str) -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer_all, payload, payload)
        with pytest.raises(PeerError, match=text):
            await client.io_fds(4)
        nursery.cancel_scope.cancel()


# The twin socket


def version(capabilities: bytes) -> bytes:
    return bytes(4) + b'{"capabilities": ' + capabilities + b"}\0"


@pytest.mark.parametrize(
    ("capabilities", "path", "text"),
    [
        (b'{"twin_socket": {"supported": true, "fd_index": 0}}', None, "fd_index 0x0 of 0x0 fds"),
        (b'{"twin_socket": {"supported": true, "fd_index": 1}}', "/dev/null", "fd_index 0x1 of 0x1 fds"),
        (b'{"twin_socket": {"supported": true, "fd_index": 0}}', "/dev/null", "is no socket"),
        (b'{"max_msg_fds": "many"}', "/dev/null", "max_msg_fds"),
    ],
)
async def test_a_version_that_is_none(
    capabilities: bytes, path: str | None, text: str, open_fds: Callable[[], int]
) -> None:
    fds = () if path is None else (os.open(path, os.O_RDWR),)
    before = open_fds()
    async with talking() as (client, server, nursery):
        nursery.start_soon(lambda: server.answer(version(capabilities), fds=fds))
        with pytest.raises(PeerError, match=text):
            await client.negotiate(TWIN_VERSION)
        assert not client.alive
    assert open_fds() == before
    for fd in fds:
        os.close(fd)


async def test_dma_belongs_on_the_twin_socket(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    read = struct.pack("<QQ", 0x1_0000_0000, 4)
    for on_twin in (True, False):
        ours, theirs = socket.socketpair()
        twin = RawClient(ours)
        async with talking() as (client, server, nursery):
            nursery.start_soon(server.answer_twin, theirs)
            await client.negotiate(TWIN_VERSION)
            theirs.close()
            nursery.start_soon(server.answer)
            await client.map_memory(PrivateMemory(4096))
            if on_twin:
                assert (await twin.call(Command.DMA_READ, read)).body == read + bytes(4)
                twin.close()
                assert "closed the twin socket" in str(await client.wait_closed())
            else:
                await server.send(server.request(Command.DMA_READ, read))
                assert "although there is a twin" in str(await client.wait_closed())
                twin.close()
    assert open_fds() == before


async def test_a_reply_on_the_twin_socket() -> None:
    ours, theirs = socket.socketpair()
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer_twin, theirs)
        await client.negotiate(TWIN_VERSION)
        theirs.close()
        nursery.start_soon(RawClient(ours).send, HEADER_CODEC.pack(1, Command.REGION_READ, 16, 1, 0))
        await fails(client, "not of a message for the twin socket", ends=True)
    ours.close()


# DMA


async def test_dma_without_a_reply() -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer)
        ram = PrivateMemory(4096)
        await client.map_memory(ram)
        write = struct.pack("<QQ", ram.address, 2) + b"hi"
        await server.send(server.request(Command.DMA_WRITE, write, flags=0x10))
        reply = await server.call(Command.DMA_READ, struct.pack("<QQ", ram.address, 2))
        assert reply.body[16:] == b"hi"


async def test_a_server_that_does_not_take_what_it_asks_for() -> None:
    """It gets no more of our memory than `MAX_UNREAD` and a reply, and all of it once it reads."""
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer)
        ram = PrivateMemory(1 << 20)
        await client.map_memory(ram)
        most = MAX_UNREAD // ram.size + 4  # some are in the socket
        await server.send(4 * most * server.request(Command.DMA_READ, struct.pack("<QQ", ram.address, ram.size)))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.dma_messages <= most
        for _ in range(4 * most):
            assert len((await server.receive()).body) == 16 + ram.size
        assert client.dma_messages == 4 * most


async def test_how_much_dma_we_take() -> None:
    options = ClientOptions(
        version=QEMU_OPTIONS.version and QEMU_OPTIONS.version.with_capabilities(max_data_xfer_size=64)
    )
    ours, theirs = socket.socketpair()
    server = FakeServer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.answer, version(b"{}"))
        async with connect_to(ours, options=options) as client:
            nursery.start_soon(server.answer)
            ram = PrivateMemory(4096)
            await client.map_memory(ram)
            for count, error in ((64, 0), (65, errno.E2BIG)):
                reply = await server.call(Command.DMA_READ, struct.pack("<QQ", ram.address, count))
                assert reply.error == error
    server.close()


async def test_the_config_space_is_region_7() -> None:
    async with talking() as (client, server, nursery):
        nursery.start_soon(server.answer, struct.pack("<QII", 0x10, PciRegion.CONFIG, 2) + b"\x34\x12")
        assert await client.config_read(0x10, 2) == 0x1234
