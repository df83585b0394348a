"""Requests of the device types, in well-formed chains: headers cut anywhere, wrong types, ranges out of bounds.

What a type's requests look like is in its declaration (`protocols.virtio.device_type.RequestShape`).
"""

from collections.abc import Mapping, Sequence
from random import Random

from vfiouser_virtio.protocols.codec import Schema, offsets
from vfiouser_virtio.protocols.virtio.device_type import RequestShape
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import ANSWERS
from vfiouser_virtio.testing.fuzz.targets import TARGETS
from vfiouser_virtio.testing.fuzz.values import mutated, number, remapped
from vfiouser_virtio.transports.pci import DEVICE, VIRTIO_BAR

# Bytes of configuration that are looked at where a type has none.
_NO_CONFIG = 64


def generate(random: Random, case: Case) -> list[Step]:
    """Bursts of requests; at times the memory, the device or the configuration changes under them."""
    kind = TARGETS[case.target].type
    config_size = kind.config.sizeof() if kind.config is not None else _NO_CONFIG
    steps: list[Step] = [_bring_up(random)]
    for _ in range(random.randint(4, 30)):
        roll = random.random()
        if roll < 0.80:
            queue, out, room = request(random, kind.requests)
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
            offset = DEVICE + random.choice((0, 8, 32, random.randrange(config_size)))
            steps.append({"do": "write", "region": VIRTIO_BAR, "offset": offset, "data": data.hex()})
            offset = DEVICE + random.choice((0, random.randrange(config_size), config_size - 1))
            steps.append({"do": "read", "region": VIRTIO_BAR, "offset": offset, "count": random.choice((1, 2, 4, 8))})
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


def request(random: Random, shapes: Sequence[RequestShape]) -> Request:
    """One of these shapes, with values that mean something, mostly."""
    [shape] = random.choices(shapes, [each.weight for each in shapes])
    message = b"" if shape.header is None else _structure(random, shape.header, shape.usual)
    if shape.entry is not None:
        message += b"".join(_structure(random, shape.entry, shape.usual) for _ in range(random.choice(shape.counts)))
    message += random.randbytes(random.choice(shape.payload))
    if random.random() < 0.1:
        message = mutated(random, message)
    return random.choice(shape.queues), _cut(random, message), _room(random, random.choice(shape.writable))


def _structure(random: Random, schema: Schema, usual: Mapping[str, Sequence[int]]) -> bytes:
    """A flat structure whose fields mostly have values that mean something; in half of them mostly the first such.

    What has a dozen fields that go together (a packet to be segmented) would else hardly ever be taken for one.
    """
    places = offsets(schema)
    fields = bytearray(max((at + size for at, size in places.values()), default=0))
    sensible = random.random() < 0.5
    for name, (at, size) in places.items():
        known = usual.get(name)
        if known and sensible and random.random() < 0.9:
            value = known[0]
        else:
            value = random.choice(known) if known and random.random() < 0.7 else number(random, 8 * size)
        fields[at : at + size] = value.to_bytes(size, "little")
    return bytes(fields)
