"""Requests of the device types, in well-formed chains: headers cut anywhere, wrong types, ranges out of bounds."""

import struct
from collections.abc import Callable
from random import Random

from vfiouser_virtio.protocols.virtio import blk, console
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import ANSWERS
from vfiouser_virtio.testing.fuzz.targets import DISK_SIZE, TARGETS
from vfiouser_virtio.testing.fuzz.values import mutated, number, pick, remapped
from vfiouser_virtio.transports.pci import DEVICE, VIRTIO_BAR

_SECTORS = DISK_SIZE // blk.SECTOR_SIZE


def generate(random: Random, case: Case) -> list[Step]:
    """Bursts of requests; at times the memory, the device or the configuration changes under them."""
    grammar = _GRAMMARS[TARGETS[case.target].requests]
    steps: list[Step] = [_bring_up(random)]
    for _ in range(random.randint(4, 30)):
        roll = random.random()
        if roll < 0.80:
            queue, out, room = grammar(random)
            step: Step = {"do": "request", "queue": queue, "out": [data.hex() for data in out], "room": room}
            if random.random() < 0.25:
                step["indirect"] = True
            if random.random() < 0.25:
                step["kick"] = False
            steps.append(step)
        elif roll < 0.86:
            steps += [{"do": "kick", "queue": queue} for queue in range(2)] + [{"do": "settle"}]
        elif roll < 0.90:
            data = random.randbytes(random.choice((1, 2, 4, 8)))
            offset = DEVICE + random.choice((0, 8, 32, random.randrange(64)))
            steps.append({"do": "write", "region": VIRTIO_BAR, "offset": offset, "data": data.hex()})
        elif roll < 0.92:
            steps.append({"do": "answers", "how": [random.choice(ANSWERS) for _ in range(random.randint(1, 4))]})
        elif roll < 0.95:
            steps += remapped(random)
        elif roll < 0.97:
            steps.append({"do": "message", "command": 13})
        else:
            steps.append(_bring_up(random))
    steps += [{"do": "kick", "queue": queue} for queue in range(4)]
    return [*steps, {"do": "settle"}]


def _bring_up(random: Random) -> Step:
    features = (1 << 128) - 1 if random.random() < 0.7 else random.getrandbits(128)
    return {"do": "bring_up", "size": random.choice((8, 16, 64)), "features": features}


Request = tuple[int, list[bytes], list[int]]
"""Queue, readable pieces, sizes of writable pieces."""


def _cut(random: Random, data: bytes) -> list[bytes]:
    """The same bytes over one to a few descriptors, one byte each at times."""
    if random.random() < 0.4 or len(data) < 2:
        return [data] if data else []
    if random.random() < 0.1 and len(data) <= 20:
        return [data[at : at + 1] for at in range(min(len(data), 7))] + ([data[7:]] if len(data) > 7 else [])
    cuts = sorted(random.randrange(1, len(data)) for _ in range(random.randint(1, 3)))
    return [piece for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if (piece := data[start:end])]


def _room(random: Random, size: int) -> list[int]:
    return [len(piece) for piece in _cut(random, bytes(size))]


def _blk(random: Random) -> Request:
    kind = random.choice((*blk.RequestType, *([blk.RequestType.IN, blk.RequestType.OUT] * 4), pick(random, 32)))
    sector = random.randrange(_SECTORS) if random.random() < 0.6 else number(random, 64)
    if random.random() < 0.1:
        sector = random.choice((_SECTORS - 1, _SECTORS, (1 << 55) - 1, 1 << 55, (1 << 64) - 1))
    header = struct.pack("<IIQ", kind, pick(random, 32), sector)
    length = blk.SECTOR_SIZE * random.choice((0, 1, 1, 2, 8, 20)) + random.choice((0, 0, 0, 1, 511))
    data, room = b"", 0
    if kind == blk.RequestType.OUT:
        data = random.randbytes(length)
    elif kind in (blk.RequestType.DISCARD, blk.RequestType.WRITE_ZEROES, blk.RequestType.SECURE_ERASE):
        data = b"".join(_segment(random) for _ in range(random.choice((0, 1, 1, 2, 16, 17))))
        data += bytes(random.choice((0, 0, 0, 1, 8)))
    elif kind == blk.RequestType.GET_ID:
        room = random.choice((20, 20, 0, 19, 21, 512))
    else:
        room = length
    message = header + data
    if random.random() < 0.1:
        message = mutated(random, message)
    room += 1 if random.random() < 0.95 else 0
    return random.randrange(2), _cut(random, message), _room(random, room)


def _segment(random: Random) -> bytes:
    sector = random.randrange(_SECTORS) if random.random() < 0.6 else number(random, 64)
    count = random.choice((0, 1, 8, _SECTORS, number(random, 32)))
    return struct.pack("<QII", sector, count, random.choice((0, 0, 1, 2, 0xFFFFFFFF)))


def _console(random: Random) -> Request:
    queue = random.randrange(6)
    if queue % 2 == 0:
        return queue, [b"x"] if random.random() < 0.1 else [], _room(random, random.choice((1, 8, 64, 4096)))
    if queue == 3:
        fields = {
            "id": random.choice((0, 1, 2, pick(random, 32))),
            "event": random.choice((*console.Event, pick(random, 16))),
        }
        message: bytes = console.CONTROL.build(fields | {"value": random.choice((0, 1, pick(random, 16)))})
        if random.random() < 0.2:
            message = mutated(random, message)
        return queue, _cut(random, message), [8] if random.random() < 0.1 else []
    return (
        queue,
        _cut(random, random.randbytes(random.choice((1, 16, 100, 5000)))),
        [8] if random.random() < 0.1 else [],
    )


def _bytes(random: Random) -> Request:
    out = random.choice((b"S", b"C", b"e", b"")) + random.randbytes(random.choice((0, 1, 64, 600)))
    return random.randrange(2), _cut(random, out), _room(random, random.choice((0, 1, 64, 1000, 5000)))


_GRAMMARS: dict[str, Callable[[Random], Request]] = {"blk": _blk, "console": _console, "bytes": _bytes}
