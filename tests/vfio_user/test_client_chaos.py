"""What a test puts on the wire instead of the right thing."""

import errno
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from support.echo_device import EchoDevice

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command, Direction
from vfiouser_virtio.vfio_user import (
    TWIN_VERSION,
    Chaos,
    Client,
    ClientOptions,
    Listener,
    Message,
    Piece,
    PrivateMemory,
    Server,
    SharedMemory,
    VersionProposal,
    pieces,
)
from vfiouser_virtio.vfio_user import connect as connect_to
from vfiouser_virtio.vfio_user.wire.connection import error_reply

MIB = 1 << 20


@asynccontextmanager
async def wrecked(
    device: EchoDevice, listener: Listener, chaos: Chaos, version: VersionProposal | None = None
) -> AsyncIterator[Client]:
    """A client with private memory, whose messages go through ``chaos``."""
    options = ClientOptions(chaos=chaos, version=version or VersionProposal(), timeout=60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(device).serve, listener)
        with PrivateMemory(MIB) as ram:
            async with connect_to(listener.name, options=options, memory=[ram]) as client:
                yield client
        nursery.cancel_scope.cancel()


class InPieces(Chaos):
    def __init__(self, size: int, pause: float) -> None:
        self.size = size
        self.pause = pause

    def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterator[Piece]:
        return pieces(message, fds, self.size, self.pause)


class Nothing(Chaos):
    """Overrides nothing."""


def test_cutting_a_message() -> None:
    assert list(pieces(b"abcde", [7], 2, 0.5)) == [(b"ab", [7]), 0.5, (b"cd", ()), 0.5, (b"e", ())]
    assert list(pieces(b"ab")) == [(b"a", ()), 0.0, (b"b", ())]


async def test_the_default_changes_nothing(device: EchoDevice, listener: Listener) -> None:
    async with wrecked(device, listener, Nothing()) as client:
        await client.bar_write(0, 0, 4, 5)
        assert await client.bar_read(0, 0, 4) == 5
        assert device.client is not None
        assert await device.client.dma_read(client.memory.address, 4) == bytes(4)


@pytest.mark.parametrize(("size", "pause"), [(1, 0.0), (5, 0.0), (16, 0.001), (1000, 0.0)])
@pytest.mark.parametrize("version", [VersionProposal(), TWIN_VERSION], ids=["one", "twin"])
async def test_messages_in_pieces(
    device: EchoDevice, listener: Listener, size: int, pause: float, version: VersionProposal
) -> None:
    async with wrecked(device, listener, InPieces(size, pause), version) as client:
        with SharedMemory(4096, address=0) as shared:
            await client.map_memory(shared)
        assert ("dma_map", 0, 4096, True, True, True, 0) in device.calls
        client.bar_post(0, 0, 8, 0x0102030405060708)
        client.bar_post(0, 8, 4, 0x11121314)
        assert await client.region_read(0, 0, 12) == b"\x08\7\6\5\4\3\2\1\x14\x13\x12\x11"
        assert device.client is not None
        await device.client.dma_write(client.memory.address, b"chopped")
        assert await device.client.dma_read(client.memory.address, 8) == b"chopped\0"


class Rules(Chaos):
    """What to do with messages of a command; the others go as they are."""

    def __init__(self, rules: dict[int, Callable[[bytes, Sequence[int]], Iterable[Piece]]]) -> None:
        self.rules = rules

    def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterable[Piece]:
        rule = self.rules.get(HEADER_CODEC.unpack_from(message)[1])
        return [(message, fds)] if rule is None else rule(message, fds)


async def test_a_dropped_message(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.DEVICE_RESET: lambda _message, _fds: []})
    async with wrecked(device, listener, rules) as client:
        client.timeout = 0.05
        with pytest.raises(PeerError, match="no reply"):
            await client.device_reset()
        client.timeout = 60
        assert "reset" not in device.names()
        assert await client.bar_read(0, 0, 1) == 0


async def test_a_doubled_message(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.DEVICE_RESET: lambda message, fds: [(message, fds)] * 2})
    async with wrecked(device, listener, rules) as client:
        await client.device_reset()
        assert "answered already" in str(await client.wait_closed())
        assert device.names().count("reset") == 2


async def test_an_altered_message(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.REGION_WRITE: lambda message, fds: [(message[:-1] + b"!", fds)]})
    async with wrecked(device, listener, rules) as client:
        await client.region_write(0, 0, b"abc")
        assert await client.region_read(0, 0, 3) == b"ab!"


async def test_extra_bytes(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.REGION_WRITE: lambda message, fds: [(message + b"\0" * 16, fds)]})
    async with wrecked(device, listener, rules) as client:
        await client.region_write(0, 0, b"abc")  # comes before the bytes that are no message
        assert (await client.wait_closed()).errno == errno.ENOTCONN


async def test_fds_come_and_go(device: EchoDevice, listener: Listener, open_fds: Callable[[], int]) -> None:
    extra = os.eventfd(0)
    rules = Rules(
        {
            Command.DMA_MAP: lambda message, _fds: [(message, ())],
            Command.DEVICE_RESET: lambda message, _fds: [(message, [extra] * 3)],
        }
    )
    before = open_fds()
    async with wrecked(device, listener, rules) as client:
        await client.device_reset()
        with SharedMemory(4096, address=0) as shared:
            await client.map_memory(shared)
            assert device.calls[-1] == ("dma_map", 0, 4096, True, True, False, 0)
    assert open_fds() == before
    os.close(extra)


async def test_fds_survive_their_sender(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.DMA_MAP: lambda message, fds: [0.05, (message, fds)]})
    async with wrecked(device, listener, rules) as client:
        fd = os.memfd_create("gone")
        client.post(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096), [fd])
        os.close(fd)
        await client.flush()
        await client.bar_read(0, 0, 1)
        assert ("dma_map", 0, 4096, True, True, True, 0) in device.calls


async def test_order_is_kept_behind_a_pause(device: EchoDevice, listener: Listener) -> None:
    rules = Rules({Command.REGION_WRITE: lambda message, fds: [0.02, (message, fds)]})
    async with wrecked(device, listener, rules) as client:
        for value in range(1, 4):
            client.bar_post(0, 0, 1, value)
        assert await client.bar_read(0, 0, 1) == 3


async def test_a_bug_of_the_chaos_is_seen(device: EchoDevice, listener: Listener) -> None:
    def rule(message: bytes, fds: Sequence[int]) -> Iterator[Piece]:
        yield message[:3], fds
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with wrecked(device, listener, Rules({Command.DEVICE_RESET: rule})) as client:
            await client.device_reset()
    assert caught.group_contains(ZeroDivisionError)


async def test_leaving_in_the_middle_of_a_message(
    device: EchoDevice, listener: Listener, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    rules = Rules({Command.REGION_WRITE: lambda message, fds: [(message[:20], fds), 100.0]})
    async with wrecked(device, listener, rules) as client:
        client.bar_post(0, 0, 4, 1)
        client.post(Command.DMA_MAP, b"", [0])
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert "region_write" not in device.names()
    assert open_fds() == before


# Replies to the server's requests


class DmaReplies(Chaos):
    def __init__(self, replies: Callable[[Message, bytes], Iterable[bytes | float]]) -> None:
        self.replies = replies

    def dma_reply(self, request: Message, reply: bytes) -> Iterable[bytes | float]:
        return self.replies(request, reply)


async def test_a_late_dma_reply_holds_up_nothing(device: EchoDevice, listener: Listener) -> None:
    order: list[str] = []

    def late(_request: Message, reply: bytes) -> Iterator[bytes | float]:
        yield 0.05
        order.append("reply")
        yield reply

    async with wrecked(device, listener, DmaReplies(late)) as client, trio.open_nursery() as nursery:
        assert device.client is not None
        nursery.start_soon(device.client.dma_write, client.memory.address, b"late")
        await client.bar_read(0, 0, 1)
        await client.bar_read(0, 0, 1)
        order.append("registers")
        await device.client.dma_read(client.memory.address, 4)
        assert order[0] == "registers"
        assert bytes(client.memory.view[:4]) == b"late"


@pytest.mark.parametrize(
    ("replies", "text"),
    [
        (lambda request, _reply: [error_reply(request.id, request.command, errno.EPERM)], "Operation not permitted"),
        (lambda _request, reply: [HEADER_CODEC.pack(1, 11, len(reply) - 1, 1, 0) + reply[16:-1]], "0x13 bytes"),
        (lambda _request, reply: [reply, reply], None),
        (lambda _request, reply: [b"\1\0\x63\0" + reply[4:], reply], None),
    ],
    ids=["error", "short", "twice", "wrong command"],
)
async def test_wrong_dma_replies(
    device: EchoDevice,
    listener: Listener,
    replies: Callable[[Message, bytes], Iterable[bytes]],
    text: str | None,
) -> None:
    async with wrecked(device, listener, DmaReplies(replies)) as client:
        assert device.client is not None
        if text is None:
            assert await device.client.dma_read(client.memory.address, 4) == bytes(4)
        else:
            with pytest.raises(PeerError, match=text):
                await device.client.dma_read(client.memory.address, 4)
        assert await client.bar_read(0, 0, 1) == 0


async def test_no_dma_reply_at_all(device: EchoDevice, listener: Listener) -> None:
    async with wrecked(device, listener, DmaReplies(lambda _request, _reply: [])) as client:
        assert device.client is not None
        with trio.move_on_after(0.05) as scope:
            await device.client.dma_read(client.memory.address, 4)
        assert scope.cancelled_caught
        assert await client.bar_read(0, 0, 1) == 0


async def test_a_trace_shows_what_was_meant(device: EchoDevice, listener: Listener) -> None:
    seen: list[tuple[Direction, int, int]] = []

    def trace(direction: Direction, message: Message) -> None:
        seen.append((direction, message.command, len(message.body)))

    chaos = DmaReplies(lambda _request, reply: [0.0, reply])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(device).serve, listener)
        options = ClientOptions(chaos=chaos, trace=trace)
        with PrivateMemory(4096) as ram:
            async with connect_to(listener.name, options=options, memory=[ram]):
                assert device.client is not None
                await device.client.dma_read(ram.address, 4)
        nursery.cancel_scope.cancel()
    to, back = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    assert seen[2:] == [
        (to, Command.DMA_MAP, 32),
        (back, Command.DMA_MAP, 0),
        (back, Command.DMA_READ, 16),
        (to, Command.DMA_READ, 20),
    ]
