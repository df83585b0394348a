"""Hostile messages: valid ones, in which few fields, the size, the flags or the end are made wrong."""

import random
import struct

from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.fuzz.message_step import HEADS, payload
from vfiouser_virtio.testing.fuzz.parsers.bench import Op
from vfiouser_virtio.testing.raw.client import raw_message

_BOUNDARIES = sorted(
    {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 23, 24, 31, 32, 33, 80, 81, 0xFFF, 0x1000, 0x1001}
    | {(1 << bits) + more for bits in (16, 20, 31, 32, 47, 63, 64) for more in (-0x1000, -1, 0, 1)}
)
_FLAGS = (0, 0x10, 1, 0x21, 0x11, 2, 3, 0xF, 0x20, 0x30, 0x40, 0x8000_0000, 0xFFFF_FFFF, 0x10, 0x10, 0x12)
_SIZES = (0, 1, 15, 16, 17, 31, 32, 1 << 20, (1 << 20) + 4096, (1 << 20) + 4097, 1 << 31, 0xFFFF_FFFF)
_GROWN = (-16, -9, -8, -4, -1, 1, 2, 8, 16, 24, 40, 4096)

Template = tuple[bytes, tuple[tuple[int, int], ...]]
"""Message, and the fields of its payload: offset and width."""


class MessageCases:
    """Cases of one batch, which are drawn from ``chance``: `make` one of each draw of bytes."""

    def __init__(self, chance: random.Random) -> None:
        self._templates = [_template(chance) for _ in range(256)]
        self._values = {
            width: [(_value(chance) & (1 << 8 * width) - 1).to_bytes(width, "little") for _ in range(256)]
            for width in (2, 4, 8)
        }

    def make(self, draw: bytes) -> list[Op]:
        """A case of these bytes."""
        at = 4
        messages = []
        for _ in range((1, 1, 1, 1, 1, 2, 2, 3)[draw[0] & 7]):
            messages.append(self._message(draw[at : at + 16]))
            at += 16
        ops: list[Op] = [("session", draw[1] < 128)]
        fds = draw[2]
        if fds < 225:
            pieces = _cut(b"".join(messages), draw[3], draw[at], draw[at + 1])
            return ops + [("receive", piece, 0, 0) for piece in pieces]
        eventfds, others = (
            (1, 0) if fds < 240 else (draw[at] & 3, 0) if fds < 248 else (draw[at] & 15, draw[at + 1] & 7)
        )
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            ops.append(("receive", message, eventfds if last else 0, others if last else 0))
        return ops

    def _message(self, draw: bytes) -> bytes:
        template, fields = self._templates[draw[0]]
        message = bytearray(template)
        message[0], message[1] = draw[1], draw[2]
        for number in range((0, 1, 1, 1, 1, 1, 2, 3)[draw[3] & 7]):
            what, which, value = draw[4 + 3 * number : 7 + 3 * number]
            if what < 170 and fields:
                offset, width = fields[which % len(fields)]
                end = offset + width
                if end <= len(message):
                    message[offset:end] = self._values[width][value]
            elif what < 195:
                struct.pack_into("<I", message, 8, _FLAGS[value & 15])
            elif what < 210:
                struct.pack_into("<I", message, 4, _SIZES[value % len(_SIZES)])
            elif what < 225:  # the size is a bit wrong, and what follows is not where it should be
                wrong = len(message) + _GROWN[value % len(_GROWN)]
                struct.pack_into("<I", message, 4, max(wrong, 0))
            elif what < 245:  # longer or shorter, as it says
                grown = _GROWN[value % len(_GROWN)]
                if grown < 0:
                    del message[max(len(message) + grown, 16) :]
                else:
                    message += bytes((which,)) * grown
                struct.pack_into("<I", message, 4, len(message))
            elif what < 252:
                struct.pack_into("<H", message, 2, value & 31)
            elif message[16:]:
                message[16 + which % (len(message) - 16)] = value
        return bytes(message)


def _cut(stream: bytes, how: int, one: int, other: int) -> list[bytes]:
    if how < 200 or len(stream) < 2:
        return [stream]
    first = 1 + one % (len(stream) - 1)
    if how < 235:
        return [stream[:first], stream[first:]]
    second = first + 1 + other % (len(stream) - first)
    return [part for part in (stream[:first], stream[first:second], stream[second:]) if part]


def _value(chance: random.Random) -> int:
    roll = chance.random()
    if roll < 0.5:
        return chance.choice(_BOUNDARIES)
    return chance.randrange(40) if roll < 0.85 else chance.getrandbits(64)


_Fields = dict[str, int]


def _template(chance: random.Random) -> Template:
    """A good message: plain accesses most, as from a guest that runs."""
    roll = chance.random()
    if roll < 0.2:
        command, content, data = _read(chance)
    elif roll < 0.4:
        command, content, data = _write(chance)
    elif roll < 0.5:
        command, content, data = _multi(chance)
    elif roll < 0.65:
        command, content, data = _irqs(chance)
    else:
        command, content, data = chance.choice(_OTHERS)(chance)
    flags = 0x10 if chance.random() < 0.15 else 0
    message = raw_message(command, payload(command, fields=content, data=data.hex()), flags=flags)
    fields = [(16 + offset, size) for offset, size in HEADS.get(command, {}).values() if size in (2, 4, 8)]
    if command == Command.REGION_WRITE_MULTI:
        entries = len(data) // 24
        fields += [(24 + 24 * entry + at, size) for entry in range(entries) for at, size in ((0, 8), (8, 4), (12, 4))]
    return message, tuple(fields)


_Content = tuple[int, _Fields, bytes]


def _access(chance: random.Random) -> tuple[_Fields, int]:
    count = chance.choice((1, 2, 4, 4, 4, 8, 16, 256))
    offset = chance.choice((0, 4, 0x10, 0x14, 0x30, 0x1000 - count, chance.randrange(0x1000)))
    return {"offset": offset, "region": chance.choice((0, 0, 1, 4, 7, 7, 8)), "count": count}, count


def _read(chance: random.Random) -> _Content:
    return Command.REGION_READ, _access(chance)[0], b""


def _write(chance: random.Random) -> _Content:
    fields, count = _access(chance)
    return Command.REGION_WRITE, fields, chance.randbytes(count)


def _multi(chance: random.Random) -> _Content:
    count = chance.choice((31, 32, 33)) if chance.random() < 0.03 else chance.choice((0, 1, 1, 2, 2, 3, 4))
    entries = b"".join(
        struct.pack(
            "<QII8s",
            chance.randrange(0xFF8),
            chance.choice((0, 0, 1, 4, 4)),
            chance.choice((1, 2, 4, 8)),
            chance.randbytes(8),
        )
        for _ in range(count)
    )
    return Command.REGION_WRITE_MULTI, {"wr_cnt": count}, entries


def _irqs(chance: random.Random) -> _Content:
    index = chance.choice((0, 1, 2, 2, 2))
    start = chance.choice((0, 0, 0, 1, 2))
    count = chance.choice((0, 1, 1, 1, 2, 4))
    flags = chance.choice((1, 2, 4, 4)) | chance.choice((8, 16, 32, 32, 32))
    data = chance.randbytes(count) if flags & 2 else b""
    return (
        Command.DEVICE_SET_IRQS,
        {"argsz": 20 + len(data), "flags": flags, "index": index, "start": start, "count": count},
        data,
    )


def _map(chance: random.Random) -> _Content:
    address, size = 0x1000 * chance.randrange(1 << 20), 0x1000 * chance.randrange(1, 1 << 10)
    fields = {
        "argsz": 32,
        "flags": chance.randrange(4),
        "offset": 0x1000 * chance.randrange(16),
        "address": address,
        "size": size,
    }
    return Command.DMA_MAP, fields, b""


def _unmap(chance: random.Random) -> _Content:
    if chance.random() < 0.2:
        return Command.DMA_UNMAP, {"argsz": 24, "flags": 2}, b""
    size = 0x1000 * chance.randrange(1, 1 << 10)
    return (
        Command.DMA_UNMAP,
        {"argsz": chance.choice((24, 24, 0)), "address": 0x1000 * chance.randrange(1 << 20), "size": size},
        b"",
    )


def _info(chance: random.Random) -> _Content:
    command, argsz = chance.choice(((4, 16), (5, 32), (5, 80), (5, 79), (5, 4096), (6, 16), (6, 4096), (7, 16)))
    fields = {"argsz": argsz}
    if command != Command.DEVICE_GET_INFO:
        fields["index"] = chance.randrange(10)
    return command, fields, b""


def _reset(_chance: random.Random) -> _Content:
    return Command.DEVICE_RESET, {}, b""


def _refused(chance: random.Random) -> _Content:
    """What this server does not do, or nobody asks it."""
    return (
        chance.choice((1, 11, 12, 14, 16, 17, 18, 0, 19, 0x8000, 0xFFFF)),
        {},
        chance.randbytes(chance.choice((0, 16, 40))),
    )


_OTHERS = (_map, _map, _unmap, _unmap, _info, _info, _info, _reset, _refused)
