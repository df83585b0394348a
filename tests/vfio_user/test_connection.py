"""Framing without a socket: whatever way the bytes arrive, the same messages come out, each with its own fds."""

import os

import pytest

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import HEADER, HEADER_CODEC, Command
from vfiouser_virtio.vfio_user.wire.connection import (
    MAX_MESSAGE_SIZE,
    Connection,
    Message,
    error_reply,
    name_of,
    reply,
    request,
)


def feed(connection: Connection, data: bytes, fds: tuple[int, ...] = (), *, fds_lost: bool = False) -> None:
    room = connection.room()
    room[: len(data)] = data
    connection.received(len(data), fds, fds_lost=fds_lost)


def drain(connection: Connection) -> list[tuple[int, int, bytes, list[int]]]:
    """(id, command, body, fds) of every complete message."""
    found = []
    while connection.next():
        message = connection.message()
        found.append((message.id, message.command, bytes(message.body), message.take_fds()))
    return found


STREAM = request(1, 9, b"x" * 16) + request(2, 13) + request(3, 10, bytes(range(200)))
EXPECTED: list[tuple[int, int, bytes, list[int]]] = [
    (1, 9, b"x" * 16, []),
    (2, 13, b"", []),
    (3, 10, bytes(range(200)), []),
]


def test_glued_messages() -> None:
    connection = Connection()
    feed(connection, STREAM)
    assert drain(connection) == EXPECTED


def test_one_byte_at_a_time() -> None:
    connection = Connection()
    found = []
    for byte in STREAM:
        feed(connection, bytes([byte]))
        found += drain(connection)
    assert found == EXPECTED


@pytest.mark.parametrize("cut", range(1, len(STREAM)))
def test_every_cut(cut: int) -> None:
    connection = Connection()
    feed(connection, STREAM[:cut])
    found = drain(connection)
    feed(connection, STREAM[cut:])
    assert found + drain(connection) == EXPECTED


def test_fds_belong_to_the_last_message_that_starts_in_the_chunk() -> None:
    # QEMU: a DMA_MAP of a ROM without an fd and one of RAM with an fd arrive as one read, which ends with the latter.
    connection = Connection()
    feed(connection, request(1, 2, bytes(32)) + request(2, 2, bytes(32)), (77,))
    assert [fds for *_, fds in drain(connection)] == [[], [77]]


def test_fds_belong_to_a_message_whose_rest_is_still_to_come() -> None:
    connection = Connection()
    first, second = request(1, 10, bytes(20)), request(2, 2, bytes(32))
    feed(connection, first[:30])
    feed(connection, first[30:] + second[:5], (77,))
    assert [fds for *_, fds in drain(connection)] == [[]]
    feed(connection, second[5:20])
    assert drain(connection) == []
    feed(connection, second[20:] + request(3, 13))
    assert [fds for *_, fds in drain(connection)] == [[77], []]


def test_fds_of_several_chunks_gather_at_one_message() -> None:
    connection = Connection()
    data = request(1, 8, bytes(20))
    feed(connection, data[:1], (5,))
    feed(connection, data[1:18], (6, 7))
    feed(connection, data[18:])
    assert [fds for *_, fds in drain(connection)] == [[5, 6, 7]]


def test_fds_find_their_message_after_the_buffer_was_reused() -> None:
    connection = Connection()
    for number in range(5000):  # several buffers full
        feed(connection, request(number, 2, bytes(32)), (number + 1000,))
        assert drain(connection) == [(number, 2, bytes(32), [number + 1000])]


def test_lost_fds_are_noted_at_their_message_only() -> None:
    connection = Connection()
    feed(connection, request(1, 2) + request(2, 2), fds_lost=True)
    feed(connection, request(3, 2))
    lost = []
    while connection.next():
        lost.append(connection.message().fds_lost)
    assert lost == [False, True, False]


def test_fds_that_pile_up_on_one_message_end_the_connection() -> None:
    connection = Connection()
    feed(connection, b"\1", tuple(range(100_000, 100_253)))
    with pytest.raises(PeerError, match="254 file descriptors") as caught:
        feed(connection, b"\0", (100_253,))
    assert caught.value.fatal


def test_the_largest_message_in_pieces_among_small_ones() -> None:
    connection = Connection()
    body = os.urandom(MAX_MESSAGE_SIZE - 16)
    stream = request(1, 13) + request(2, 10, body) + request(3, 13)
    found = []
    while stream:
        room = connection.room()
        assert len(room) >= 64 * 1024
        count = min(len(room), len(stream), 50_000)
        feed(connection, stream[:count])
        stream = stream[count:]
        found += drain(connection)
    assert found == [(1, 13, b"", []), (2, 10, body, []), (3, 13, b"", [])]
    assert len(connection.room()) == 128 * 1024  # what the large one took has been given back


@pytest.mark.parametrize("size", [0, 1, 15, MAX_MESSAGE_SIZE + 1, 0xFFFFFFFF])
def test_an_impossible_size_ends_the_connection(size: int) -> None:
    connection = Connection()
    feed(connection, HEADER_CODEC.pack(1, 9, size, 0, 0))
    with pytest.raises(PeerError, match=f"REGION_READ: message size 0x{size:x}") as caught:
        connection.next()
    assert caught.value.fatal


def test_an_announced_size_allocates_nothing_much() -> None:
    connection = Connection()
    feed(connection, HEADER_CODEC.pack(1, 10, MAX_MESSAGE_SIZE, 0, 0))
    assert not connection.next()
    assert len(connection.room()) < 2 * MAX_MESSAGE_SIZE


def test_close_closes_what_nobody_took_and_tells_of_a_cut_message() -> None:
    connection = Connection()
    taken, untaken, incomplete = (os.eventfd(0) for _ in range(3))
    feed(connection, request(1, 2), (taken,))
    assert connection.next()
    connection.message()
    feed(connection, request(2, 2), (untaken,))
    assert connection.next()  # and message() is never called
    feed(connection, request(3, 2)[:10], (incomplete,))
    assert connection.close()
    for fd in (untaken, incomplete):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.close(taken)
    assert not Connection().close()


def test_what_we_send_is_what_the_schema_describes() -> None:
    parsed = HEADER.parse(request(0x1234, Command.DMA_READ, b"12345", 0x10))
    assert (parsed.id, parsed.command, parsed.size, parsed.flags, parsed.error) == (0x1234, 11, 21, 0x10, 0)
    parsed = HEADER.parse(reply(1, 13))
    assert (parsed.size, parsed.flags, parsed.error) == (16, 1, 0)
    parsed = HEADER.parse(error_reply(1, 13, 95))
    assert (parsed.size, parsed.flags, parsed.error) == (16, 0x21, 95)


def test_message_flags() -> None:
    assert Message(1, 13, 0, 0, b"").wants_reply
    assert not Message(1, 13, 0x10, 0, b"").wants_reply
    assert not Message(1, 13, 1, 0, b"").wants_reply
    assert Message(1, 13, 0x21, 5, b"").is_reply
    assert not Message(1, 13, 0x10, 0, b"").is_reply


def test_names() -> None:
    assert name_of(2) == "DMA_MAP"
    assert name_of(0x2A) == "command 0x2a"
