"""DMA_READ and DMA_WRITE towards a client: sizes, how much is under way, and every kind of answer."""

import errno
import struct
from typing import Any

import pytest
import trio
import trio.testing
from support.waiting import begin_and_cancel

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command
from vfiouser_virtio.vfio_user.server.dma_proxy import DmaProxy
from vfiouser_virtio.vfio_user.wire.connection import Message

MIB = 1 << 20


class Peer:
    """Collects what is sent, and answers out of a bytearray when told."""

    def __init__(self, max_data_xfer_size: int = MIB, **options: Any) -> None:
        self.memory = bytearray(range(256)) * 4096 * 4
        self.sent: list[tuple[int, int, int, int, bytes]] = []
        self.client = DmaProxy("peer", self.receive, max_data_xfer_size, **options)

    def receive(self, data: bytes) -> None:
        message_id, command, size, flags, _error = HEADER_CODEC.unpack_from(data)
        address, count = struct.unpack_from("<QQ", data, 16)
        assert (size, flags) == (len(data), 0)
        assert len(data) == 32 + (count if command == Command.DMA_WRITE else 0)
        self.sent.append((message_id, command, address, count, data[32:]))

    def answer(self, index: int = 0) -> None:
        message_id, command, address, count, data = self.sent.pop(index)
        body = struct.pack("<QQ", address, count)
        if command == Command.DMA_READ:
            body += self.memory[address : address + count]
        else:
            self.memory[address : address + count] = data
        self.client.reply(Message(message_id, command, 1, 0, body))

    async def answer_all(self) -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if self.sent:
                self.answer()
            else:
                await trio.sleep(0.001)


@pytest.fixture
def peer() -> Peer:
    return Peer()


async def blocked() -> None:
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("count", [1, 32767, 32768, 32769, 100_000])
async def test_read(peer: Peer, nursery: trio.Nursery, count: int) -> None:
    nursery.start_soon(peer.answer_all)
    assert await peer.client.dma_read(0x10, count) == peer.memory[0x10 : 0x10 + count]


@pytest.mark.parametrize("count", [1, MIB, MIB + 1, 3 * MIB])
async def test_write(peer: Peer, nursery: trio.Nursery, count: int) -> None:
    nursery.start_soon(peer.answer_all)
    data = bytes(reversed(range(256))) * (count // 256 + 1)
    await peer.client.dma_write(0x20, data[:count])
    assert peer.memory[0x20 : 0x20 + count] == data[:count]


async def test_nothing_is_no_message(peer: Peer) -> None:
    assert await peer.client.dma_read(0, 0) == b""
    await peer.client.dma_write(0, b"")
    assert peer.sent == []


async def test_pieces_respect_the_clients_limit(nursery: trio.Nursery) -> None:
    peer = Peer(1000)
    nursery.start_soon(peer.client.dma_write, 0, bytes(2500))
    nursery.start_soon(peer.client.dma_read, 0, 1001)
    await blocked()
    assert sorted((command, count) for _id, command, _address, count, _ in peer.sent) == [(11, 1000), (12, 1000)]
    nursery.start_soon(peer.answer_all)
    await trio.sleep(0.05)
    nursery.cancel_scope.cancel()


async def test_never_more_than_32_kib_of_reads_are_under_way(peer: Peer, nursery: trio.Nursery) -> None:
    results: list[bytes] = []

    async def read(address: int, count: int) -> None:
        results.append(await peer.client.dma_read(address, count))

    for number in range(20):
        nursery.start_soon(read, number * 0x4000, 0x4000)
    for _ in range(10):
        await blocked()
        assert sum(count for _id, _command, _address, count, _ in peer.sent) == 0x8000
        peer.answer(1)
        peer.answer(0)
    await blocked()
    assert len(results) == 20
    assert peer.sent == []


async def test_small_reads_count_for_the_socket_buffer_they_need(peer: Peer, nursery: trio.Nursery) -> None:
    for _ in range(100):
        nursery.start_soon(peer.client.dma_read, 0, 2)
    await blocked()
    assert len(peer.sent) == 64
    assert len({message_id for message_id, *_ in peer.sent}) == 64
    nursery.cancel_scope.cancel()


async def test_a_large_read_is_not_overtaken_for_ever(peer: Peer, nursery: trio.Nursery) -> None:
    order: list[str] = []

    async def read(name: str, count: int) -> None:
        await peer.client.dma_read(0, count)
        order.append(name)

    nursery.start_soon(read, "first", 16384)
    await blocked()
    nursery.start_soon(read, "large", 32768)
    await blocked()
    nursery.start_soon(read, "small", 1)
    await blocked()
    assert len(peer.sent) == 1
    nursery.start_soon(peer.answer_all)
    with trio.fail_after(60):
        while len(order) < 3:
            await trio.sleep(0.001)
    assert order == ["first", "large", "small"]


async def test_a_cancelled_read_keeps_its_place_until_it_is_answered(peer: Peer, nursery: trio.Nursery) -> None:
    await begin_and_cancel(peer.client.dma_read, 0, 32768)
    nursery.start_soon(peer.client.dma_read, 0x100, 4)
    await blocked()
    assert len(peer.sent) == 1  # the abandoned one; its 32 KiB may still come
    peer.answer()
    await blocked()
    assert [sent[2] for sent in peer.sent] == [0x100]
    peer.answer()


async def failing(peer: Peer, nursery: trio.Nursery, message: Message, *, write: bool = False) -> PeerError:
    caught: list[PeerError] = []

    async def run() -> None:
        with pytest.raises(PeerError) as error:
            await (peer.client.dma_write(0x40, b"abcd") if write else peer.client.dma_read(0x40, 4))
        caught.append(error.value)

    nursery.start_soon(run)
    await blocked()
    message.id = peer.sent.pop()[0]
    peer.client.reply(message)
    await blocked()
    return caught[0]


async def test_errors_of_the_client(peer: Peer, nursery: trio.Nursery) -> None:
    error = await failing(peer, nursery, Message(0, 11, 0x21, errno.ENODEV, b""))
    assert error.errno == errno.ENODEV
    assert "DMA_READ" in str(error)
    assert (await failing(peer, nursery, Message(0, 12, 0x21, 7, b""), write=True)).errno == 7
    assert (await failing(peer, nursery, Message(0, 11, 0x21, 0, b""))).errno == errno.EIO
    assert (await failing(peer, nursery, Message(0, 11, 0x21, 0xFFFFFFFF, b""))).errno == errno.EIO


@pytest.mark.parametrize("size", [0, 3, 4, 15, 19, 21, 100])
async def test_a_reply_of_the_wrong_length(peer: Peer, nursery: trio.Nursery, size: int) -> None:
    error = await failing(peer, nursery, Message(0, 11, 1, 0, bytes(size)))
    assert error.errno == errno.EIO
    assert f"0x{size:x} bytes" in str(error)


@pytest.mark.parametrize("body", [struct.pack("<QQ", 0x40, 4), struct.pack("<QI", 0x40, 4)])
async def test_both_framings_of_a_read(peer: Peer, nursery: trio.Nursery, body: bytes) -> None:
    found: list[bytes] = []

    async def read() -> None:
        found.append(await peer.client.dma_read(0x40, 4))

    nursery.start_soon(read)
    await blocked()
    peer.client.reply(Message(peer.sent.pop()[0], 11, 1, 0, body + b"abcd"))
    await blocked()
    assert found == [b"abcd"]


@pytest.mark.parametrize("body", [b"", bytes(12), bytes(16)])
async def test_every_framing_of_a_write(peer: Peer, nursery: trio.Nursery, body: bytes) -> None:
    nursery.start_soon(peer.client.dma_write, 0x40, b"abcd")
    await blocked()
    peer.client.reply(Message(peer.sent.pop()[0], 12, 1, 0, body))


async def test_replies_to_nothing(peer: Peer, nursery: trio.Nursery) -> None:
    with pytest.raises(PeerError, match="id 0x63"):
        peer.client.reply(Message(0x63, 11, 1, 0, b""))
    nursery.start_soon(peer.client.dma_write, 0, b"x")
    await blocked()
    message_id = peer.sent[0][0]
    with pytest.raises(PeerError, match="DMA_READ"):
        peer.client.reply(Message(message_id, 11, 1, 0, b""))  # that id was a DMA_WRITE
    peer.answer()
    with pytest.raises(PeerError, match="of no request"):
        peer.client.reply(Message(message_id, 12, 1, 0, b""))


async def test_after_the_end(peer: Peer) -> None:
    peer.client.close()
    with pytest.raises(PeerError, match="gone"):
        await peer.client.dma_read(0, 1)
    with pytest.raises(PeerError, match="gone"):
        await peer.client.dma_write(0, b"x")


async def test_ids_wrap_around_those_in_use(nursery: trio.Nursery) -> None:
    peer = Peer(ids=4)
    nursery.start_soon(peer.client.dma_read, 0, 1)
    await blocked()
    assert peer.sent.pop()[0] == 1  # under way all the time
    ids = []
    for _ in range(5):
        nursery.start_soon(peer.client.dma_write, 0, b"x")
        await blocked()
        ids.append(peer.sent[0][0])
        peer.answer()
    assert ids == [2, 3, 0, 2, 3]
    nursery.cancel_scope.cancel()
