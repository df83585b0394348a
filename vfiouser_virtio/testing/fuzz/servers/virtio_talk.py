"""Conversation of a virtio driver by messages: it starts a device, puts requests into its rings, and notifies it.

Rings and buffers lie in the RAM that the client maps (`fuzz.ram`); they are made by hand, as what is wrong with them is
put in here: the mutations of a conversation know messages alone.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.vfio_user import Command, PciRegion
from vfiouser_virtio.protocols.virtio.device_types import known_type
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import CAP, COMMON_CFG_OFFSETS, VENDOR_ID, CfgType
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, PACKED_DESC_CODEC, DescFlags
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.ram import HEAP, HEAP_END, RING_STRIDE, RINGS, TABLES
from vfiouser_virtio.testing.fuzz.requests import request
from vfiouser_virtio.testing.fuzz.values import number
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, RegisterWrite, enable_queue, negotiate
from vfiouser_virtio.testing.raw.ring import Segment
from vfiouser_virtio.testing.raw.split import Descriptor, linked

CONFIG_SIZE = 256
_CAPABILITIES_AT, _VENDOR_CAPABILITY, _FIRST_DEVICE = 0x34, 9, 0x1040
_COMMAND_AT, _DECODED_AND_MASTER = 4, b"\x06\x00"
_CAP = offsets(CAP)
_QUEUES = 2
_WRITE, _NEXT, _INDIRECT = int(DescFlags.WRITE), int(DescFlags.NEXT), int(DescFlags.INDIRECT)
_AVAIL = int(DescFlags.AVAIL)
_LOOKS = 4
"""Reads of the status behind a notification: a server that polls its rings needs the time."""


@dataclass(frozen=True, slots=True)
class ShownVirtio:
    """Virtio device that is shown: its id, and where its structures lie, as region and offset."""

    device_id: int
    structures: Mapping[int, tuple[int, int]]
    """By `CfgType`."""
    multiplier: int = 0
    """Of notification offsets."""

    @staticmethod
    def of(config: bytes) -> "ShownVirtio | None":
        """Out of config space; None for another device, or one without a common configuration."""
        config = config.ljust(CONFIG_SIZE, b"\0")
        vendor, device = struct.unpack_from("<HH", config)
        structures: dict[int, tuple[int, int]] = {}
        multiplier, at = 0, config[_CAPABILITIES_AT]
        for _ in range(CONFIG_SIZE // 4):
            if not 0 < at <= CONFIG_SIZE - CAP.sizeof() - 4:
                break
            if config[at] == _VENDOR_CAPABILITY:
                kind, bar, offset = (_field(config, at, name) for name in ("cfg_type", "bar", "offset"))
                structures.setdefault(kind, (bar, offset))
                if kind == CfgType.NOTIFY:
                    multiplier = int.from_bytes(config[at + CAP.sizeof() : at + CAP.sizeof() + 4], "little")
            at = config[at + 1]
        if vendor != VENDOR_ID or device < _FIRST_DEVICE or CfgType.COMMON not in structures:
            return None
        return ShownVirtio(device - _FIRST_DEVICE, structures, multiplier)


def _field(config: bytes, at: int, name: str) -> int:
    offset, size = _CAP[name]
    return int.from_bytes(config[at + offset : at + offset + size], "little")


def talk(random: Random, shown: ShownVirtio) -> list[Step]:
    """From reset to requests, and on: mostly what a driver does."""
    features = Feature.VERSION_1.mask | random.choice((0, 0, Feature.INDIRECT_DESC.mask, random.getrandbits(64)))
    packed = random.random() < 0.3
    features = features | Feature.RING_PACKED.mask if packed else features & ~Feature.RING_PACKED.mask
    size = random.choice((8, 16, 64, 64, 128))
    writes: list[RegisterWrite] = [("device_status", 0), *negotiate(features)]
    steps: list[Step] = [_write(PciRegion.CONFIG, _COMMAND_AT, _DECODED_AND_MASTER)]
    for index in range(_QUEUES):
        at = RINGS + RING_STRIDE * index
        writes += enable_queue(index, (at, at + 0x800, at + 0x1000), size=size)
        steps.append({"do": "poke", "at": at, "data": bytes(RING_STRIDE).hex()})
    steps += [*_writes(shown, [*writes, ("device_status", DRIVER_OK)])]
    for _ in range(random.choice((1, 1, 2, 3))):
        queue = random.randrange(_QUEUES)
        steps += _requests(random, shown, queue, size, packed=packed)
        steps += [_notify(shown, queue), *[_read_status(shown)] * _LOOKS]
        if random.random() < 0.3:
            steps += _writes(shown, random.choice(_UNDER_WAY))
    return steps


_UNDER_WAY: Sequence[Sequence[RegisterWrite]] = (
    [("device_status", 0)],
    [("queue_select", 0), ("queue_enable", 0)],
    [("queue_select", 0), ("queue_reset", 1)],
    [("queue_select", 0xFFFF), ("queue_size", 3), ("queue_enable", 1)],
    [("queue_select", 0), ("queue_desc", 1 << 40), ("queue_enable", 1)],
    [("device_status", 0), ("device_status", DRIVER_OK)],
)
"""What a driver writes while its requests are under way, or out of order."""


def _writes(shown: ShownVirtio, writes: Iterable[RegisterWrite]) -> Iterable[Step]:
    """Each as a message of its own; 64 bits in two halves, as all drivers write them."""
    region, start = shown.structures[CfgType.COMMON]
    for name, value in writes:
        at, width = COMMON_CFG_OFFSETS[name]
        for half in range(0, width, 4):
            part = (value >> 8 * half & 0xFFFF_FFFF).to_bytes(4, "little")[: min(width, 4)]
            yield _write(region, start + at + half, part)


def _write(region: int, offset: int, data: bytes) -> Step:
    fields = {"offset": offset, "region": int(region), "count": len(data)}
    return {"do": "message", "command": Command.REGION_WRITE.name, "fields": fields, "data": data.hex()}


def _read_status(shown: ShownVirtio) -> Step:
    region, start = shown.structures[CfgType.COMMON]
    fields = {"offset": start + COMMON_CFG_OFFSETS["device_status"][0], "region": region, "count": 1}
    return {"do": "message", "command": Command.REGION_READ.name, "fields": fields}


def _notify(shown: ShownVirtio, queue: int) -> Step:
    region, start = shown.structures.get(CfgType.NOTIFY, (int(PciRegion.BAR0), 0))
    return _write(region, start + shown.multiplier * queue, queue.to_bytes(2, "little"))


def _requests(random: Random, shown: ShownVirtio, queue: int, size: int, *, packed: bool) -> list[Step]:
    """Chains of a queue: requests of the type, or bytes; at times with something wrong in a descriptor."""
    kind = known_type(shown.device_id)
    steps: list[Step] = []
    table: list[Descriptor] = []
    heads: list[int] = []
    heap = HEAP
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        _, out, room = request(random, kind.requests) if kind and kind.requests else _anything(random)
        chain: list[Segment] = []
        for data, length in [*((data, len(data)) for data in out), *((b"", length) for length in room)]:
            if heap + length > HEAP_END:
                heap = HEAP
            if data:
                steps.append({"do": "poke", "at": heap, "data": data.hex()})
            chain.append((heap, length, 0 if data else _WRITE))
            heap += length
        if not chain or len(table) + len(chain) > size:
            break
        if random.random() < 0.2:
            entries = _placed(chain, 0, packed=packed)
            codec = PACKED_DESC_CODEC if packed else DESC_CODEC
            data = b"".join(codec.pack(*_ordered(entry, packed=packed)) for entry in entries)
            steps.append({"do": "poke", "at": TABLES, "data": data.hex()})
            chain = [(TABLES, len(data), _INDIRECT)]
        heads.append(len(table))
        table += _placed(chain, len(table), packed=packed, available=packed)
    if table and random.random() < 0.4:
        at = random.randrange(len(table))
        table[at] = _spoiled(random, table[at])
    start = RINGS + RING_STRIDE * queue
    codec = PACKED_DESC_CODEC if packed else DESC_CODEC
    data = b"".join(codec.pack(*_ordered(entry, packed=packed)) for entry in table)
    steps.append({"do": "poke", "at": start, "data": data.hex()})
    if not packed:
        heads = [random.choice((head, head, head, head, number(random, 16))) for head in heads]
        index = len(heads) if random.random() < 0.9 else number(random, 16)
        data = struct.pack(f"<HH{len(heads)}H", 0, index, *heads)
        steps.append({"do": "poke", "at": start + 0x800, "data": data.hex()})
    return steps


def _placed(chain: Sequence[Segment], first: int, *, packed: bool, available: bool = False) -> list[Descriptor]:
    """The descriptors of a chain at their places from index ``first`` on; of a packed ring with an id, not a link."""
    return [
        (address, length, flags | (_AVAIL if available else 0), first if packed else following)
        for address, length, flags, following in linked(chain, range(first, first + len(chain)))
    ]


def _ordered(entry: Descriptor, *, packed: bool) -> tuple[int, int, int, int]:
    """As the ring has it: a packed one has the id before the flags."""
    address, length, flags, name = entry
    return (address, length, name, flags) if packed else entry


def _spoiled(random: Random, entry: Descriptor) -> Descriptor:
    address, length, flags, name = entry
    how = random.randrange(4)
    if how == 0:
        return number(random, 64), length, flags, name
    if how == 1:
        return address, number(random, 32), flags, name
    if how == 2:
        return address, length, flags ^ random.choice((_WRITE, _NEXT, _INDIRECT, 0x80, 0x8000, 0xFFFF)), name
    return address, length, flags | _NEXT, random.choice((0, number(random, 16)))


def _anything(random: Random) -> tuple[int, list[bytes], list[int]]:
    return 0, [random.randbytes(random.choice((1, 16, 64)))], [random.choice((1, 16, 512))]
