"""Messages as lines."""

import json
import struct

import pytest

from vfiouser_virtio.protocols.vfio_user import COMMANDS, Command, Direction
from vfiouser_virtio.serving.decode import decode, decode_fields
from vfiouser_virtio.testing.conversation import KEPT, Conversation
from vfiouser_virtio.vfio_user import Message


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QII", offset, region, count) + data


@pytest.mark.parametrize(
    ("command", "flags", "body", "fds", "line"),
    [
        (Command.VERSION, 0, struct.pack("<HH", 0, 1) + b'{"a": 1}\0', 0, 'VERSION 0.1 {"a": 1}'),
        (Command.VERSION, 1, struct.pack("<HH", 0, 1), 0, "VERSION 0.1 without JSON"),
        (
            Command.DMA_MAP,
            0,
            struct.pack("<IIQQQ", 32, 3, 0, 0x10000, 0x2000),
            1,
            "DMA_MAP flags=READ|WRITE offset=0 address=0x10000 size=0x2000 with 1 fd",
        ),
        (Command.DMA_MAP, 1, b"", 0, "DMA_MAP done"),
        (Command.REGION_READ, 0, access(0x14, 4, 1), 0, "REGION_READ BAR4+0x14 device_status 1 bytes"),
        (Command.REGION_READ, 1, access(0x14, 4, 1, b"\x0f"), 0, "REGION_READ BAR4+0x14 device_status = 0x0f"),
        (
            Command.REGION_WRITE,
            16,
            access(0x24, 4, 4, b"\1\2\3\4"),
            0,
            "REGION_WRITE (no reply) BAR4+0x24 queue_desc+4 = 0x04030201",
        ),
        (Command.REGION_WRITE, 0, access(4, 7, 2, b"\6\0"), 0, "REGION_WRITE config+0x4 command = 0x0006"),
        (Command.REGION_WRITE, 0, access(0x3004, 4, 2, b"\1\0"), 0, "REGION_WRITE BAR4+0x3004 notify queue 1 = 0x0001"),
        (Command.REGION_READ, 0, access(0, 77, 2), 0, "REGION_READ region 77+0x0 2 bytes"),
        (Command.REGION_READ, 0, b"short", 0, "REGION_READ 73 68 6f 72 74"),
        (Command.DMA_READ, 0, struct.pack("<QQ", 0x1000, 12), 0, "DMA_READ 0x1000 12 bytes"),
        (Command.DMA_WRITE, 0, struct.pack("<QQ", 0x1000, 3) + b"abc", 0, "DMA_WRITE 0x1000 = 61 62 63"),
        (
            Command.DEVICE_SET_IRQS,
            0,
            struct.pack("<IIIII", 20, 0x24, 2, 0, 1),
            1,
            "DEVICE_SET_IRQS flags=DATA_EVENTFD|ACTION_TRIGGER index=MSIX start=0 count=1 with 1 fd",
        ),
        (77, 0, b"\1", 0, "command 77: 01"),
    ],
)
def test_line(command: int, flags: int, body: bytes, fds: int, line: str) -> None:
    assert decode(Message(1, command, flags, 0, body, [0] * fds)) == line


def test_an_error() -> None:
    assert decode(Message(1, Command.DEVICE_RESET, 0x21, 22, b"")) == "DEVICE_RESET refused: EINVAL"
    assert decode(Message(1, Command.DEVICE_RESET, 0x21, 7777, b"")) == "DEVICE_RESET refused: 7777"


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("command", COMMANDS)
def test_any_bytes_give_a_line(command: int, flags: int) -> None:
    for size in range(80):
        for fill in (b"\0", b"\xff", b"\1"):
            assert "\n" not in decode(Message(1, command, flags, 0, fill * size))
            assert json.loads(json.dumps(fields := decode_fields(Message(1, command, flags, 0, fill * size)))) == fields


def test_a_conversation_keeps_the_newest() -> None:
    conversation = Conversation("disk")
    for number in range(KEPT + 5):
        body = bytearray(access(number, 4, 4096, bytes(4096)))
        conversation.record(Direction.SERVER_TO_CLIENT, Message(1, Command.REGION_READ, 1, 0, body))
        body[:] = bytes(len(body))  # it was valid during the call only
    heading, *lines = conversation.text().splitlines()
    assert heading.startswith(f"disk: {KEPT + 5} messages, the last {KEPT} ")
    assert len(lines) == KEPT
    assert "← REGION_READ BAR4+0x5 device_feature+1 = 00 00" in lines[0]
    assert lines[-1].endswith("(4096 bytes)")


def test_an_answer_right_behind_its_request_is_one_line_with_it() -> None:
    conversation = Conversation("disk")
    ask, answer = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    conversation.record(ask, Message(1, Command.REGION_READ, 0, 0, access(0x14, 4, 1)))
    conversation.record(answer, Message(1, Command.REGION_READ, 1, 0, access(0x14, 4, 1, b"\x0f")))
    conversation.record(ask, Message(2, Command.REGION_WRITE, 0, 0, access(0x14, 4, 1, b"\0")))
    conversation.record(answer, Message(2, Command.REGION_WRITE, 1, 0, access(0x14, 4, 1)))
    conversation.record(ask, Message(3, Command.REGION_READ, 0, 0, access(0x14, 4, 1)))
    conversation.record(answer, Message(3, Command.REGION_READ, 0x21, 22, b""))
    conversation.record(ask, Message(4, Command.REGION_READ, 0, 0, access(0x14, 4, 1)))
    conversation.record(answer, Message(1, Command.DMA_READ, 0, 0, struct.pack("<QQ", 0x1000, 4)))
    for message_id in range(3):
        notify = access(0x3000, 4, 2, b"\0\0")
        conversation.record(ask, Message(message_id, Command.REGION_WRITE, 16, 0, notify))
    assert [line.split(maxsplit=1)[1] for line in conversation.lines()] == [
        "→ REGION_READ BAR4+0x14 device_status = 0x0f",
        "→ REGION_WRITE BAR4+0x14 device_status = 0x00",
        "→ REGION_READ BAR4+0x14 device_status 1 bytes",
        "← REGION_READ refused: EINVAL",
        "→ REGION_READ BAR4+0x14 device_status 1 bytes",
        "← DMA_READ 0x1000 4 bytes",
        "→ REGION_WRITE (no reply) BAR4+0x3000 notify queue 0 = 0x0000   (× 3)",
    ]
