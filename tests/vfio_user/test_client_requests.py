"""Which reply belongs to which request, and what QEMU would not survive."""

import errno
import struct

import pytest
from support.waiting import begin_and_cancel

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.vfio_user.client.requests import Pending, Requests, reply_limit
from vfiouser_virtio.vfio_user.wire.connection import Message

REPLY, ERROR = 1, 0x21
READ = Command.REGION_READ


def reply(
    message_id: int = 1, command: int = READ, body: bytes = b"", *, flags: int = REPLY, error: int = 0
) -> Message:
    return Message(message_id, command, flags, error, body)


async def gave_up(pending: Pending) -> None:
    with pytest.raises(PeerError) as caught:
        await pending.wait(0)
    assert caught.value.errno == errno.ETIMEDOUT
    assert not caught.value.fatal


def test_one_id_for_all_is_first_come_first_served() -> None:
    requests = Requests()
    first, second = requests.add(0, READ, 99), requests.add(0, READ, 99)
    assert requests.match(reply(0)) is first
    assert requests.match(reply(0)) is second


def test_ids_may_be_answered_in_any_order() -> None:
    requests = Requests()
    first, second = requests.add(1, READ, 99), requests.add(2, READ, 99)
    assert requests.match(reply(2)) is second
    assert requests.match(reply(1)) is first


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (reply(2), "id 0x2, which no request has"),
        (reply(1, Command.REGION_WRITE), "command 0xa, not 0x9"),
        (reply(1, flags=ERROR), "errno 0x0"),
    ],
)
async def test_what_is_no_answer(message: Message, text: str) -> None:
    requests = Requests()
    pending = requests.add(1, READ, 99)
    with pytest.raises(PeerError, match=text) as caught:
        requests.match(message)
    assert (caught.value.errno, caught.value.fatal) == (errno.EPROTO, True)
    requests.close(caught.value)
    with pytest.raises(PeerError, match=text):
        await pending.wait(5)


async def test_two_answers_are_one_too_many() -> None:
    requests = Requests()
    requests.add(1, READ, 99)
    requests.match(reply())
    with pytest.raises(PeerError, match="answered already"):
        requests.match(reply())


async def test_a_late_reply_is_nobodys() -> None:
    requests = Requests()
    await gave_up(requests.add(1, READ, 99))
    assert requests.match(reply(body=bytes(20))) is None
    second = requests.add(1, READ, 99)
    assert requests.match(reply()) is second


async def test_a_cancelled_waiter_has_given_up() -> None:
    requests = Requests()
    pending = requests.add(1, READ, 99)
    await begin_and_cancel(pending.wait, 100)
    assert requests.match(reply()) is None


async def test_qemu_survives_a_late_header_only() -> None:
    requests = Requests(strict=True)
    await gave_up(requests.add(1, READ, 99))
    assert requests.match(reply()) is None
    await gave_up(requests.add(1, READ, 99))
    with pytest.raises(PeerError, match="QEMU's rule"):
        requests.match(reply(body=b"x"))


@pytest.mark.parametrize("strict", [False, True])
def test_qemu_has_only_so_much_room(strict: bool) -> None:
    requests = Requests(strict=strict)
    exact = requests.add(1, READ, 20)
    assert requests.match(reply(body=bytes(4))) is exact
    larger = requests.add(1, READ, 20)
    if strict:
        with pytest.raises(PeerError, match=r"0x15 bytes.*QEMU's rule.*0x14 bytes"):
            requests.match(reply(body=bytes(5)))
    else:
        assert requests.match(reply(body=bytes(5))) is larger


def test_qemu_wants_no_fds_with_most_replies() -> None:
    requests = Requests(strict=True)
    info = requests.add(1, Command.DEVICE_GET_REGION_INFO, 99)
    assert requests.match(Message(1, Command.DEVICE_GET_REGION_INFO, 1, 0, b"", [1000])) is info
    requests.add(1, READ, 99)
    with pytest.raises(PeerError, match="0x1 fds"):
        requests.match(Message(1, READ, 1, 0, b"", [1000]))


@pytest.mark.parametrize(
    ("command", "payload", "limit"),
    [
        (Command.VERSION, bytes(198), 214),
        (Command.DMA_MAP, bytes(32), 48),
        (Command.REGION_WRITE, bytes(20), 36),
        (Command.REGION_READ, struct.pack("<QII", 0, 7, 256), 32 + 256),
        (Command.REGION_READ, b"short", 21),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 80, 0, 0, 0, 0, 0), 16 + 80),
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 1, 0, 0, 0), 32),
        (Command.MIG_DATA_READ, struct.pack("<II", 8, 100), 16 + 8 + 100),
        (Command.DEVICE_RESET, b"", 16),
        (99, bytes(3), 19),
    ],
)
def test_how_much_room_qemu_has(command: int, payload: bytes, limit: int) -> None:
    assert reply_limit(command, payload) == limit
