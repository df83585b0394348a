"""Requests of disks (virtio 1.4, 5.2.6) without queue and host: what `devices.blk_requests` makes of each.

The code is that which serves a queue; a disk in memory answers at once, so nothing of it waits.
"""

import itertools
import logging
import random
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, cast

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.blk_requests import BlockRequests
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.bench import ParserBench
from vfiouser_virtio.testing.fuzz.parsers.chains import SIZE, ChainMemory
from vfiouser_virtio.virtio import Chain, Queue

SECTORS, SERIAL = 16, b"a disk"
_SECTOR = 512
_CONTENT = random.Random(2013).randbytes(SECTORS * _SECTOR)
_HEADER, _SEGMENT = struct.Struct("<IIQ"), struct.Struct("<QII")
_OK, _IOERR, _UNSUPP = 0, 1, 2
_MOST_SECTORS, _MOST_SEGMENTS = (256 << 20) // _SECTOR, 16

_KINDS = (0, 0, 0, 1, 1, 1, 4, 8, 8, 11, 11, 11, 13, 13, 13, 2, 10, 14, 15, 24, 255, 1 << 31, 0x0B00_0000, 0xFFFF_FFFF)
_PLACES = (
    0,
    1,
    2,
    7,
    14,
    15,
    16,
    17,
    1 << 20,
    (1 << 31) - 1,
    1 << 32,
    (1 << 55) - 1,
    1 << 55,
    (1 << 63),
    (1 << 64) - 1,
)
_LENGTHS = (0, 1, 15, 16, 17, 20, 32, 256, 511, 512, 513, 1024, 1536, 2048, 16 * 16, 16 * 17)
_COUNTS = (0, 1, 2, 8, 15, 16, 17, _MOST_SECTORS - 1, _MOST_SECTORS, _MOST_SECTORS + 1, 1 << 31, 0xFFFF_FFFF)
_SEGMENT_FLAGS = (0, 0, 0, 0, 1, 1, 2, 3, 1 << 31)
_VALID = 200


class BlkCase(NamedTuple):
    """Request, as its descriptors have it, and the disk that gets it."""

    readable: list[bytes]
    writable: list[int]
    readonly: bool
    unmaps: bool


class ListedDisk:
    """Disk in memory that says what was done with it; `BlockBackend`, as far as nothing waits."""

    size = SECTORS * _SECTOR

    def __init__(self) -> None:
        self.readonly = False
        self.content = bytearray(_CONTENT)
        self.done: list[tuple[object, ...]] = []

    def read_nowait(self, offset: int, segments: Sequence[memoryview]) -> bool:
        for segment in segments:
            segment[:] = self.content[offset : offset + len(segment)]
            offset += len(segment)
        self.done.append(("read",))
        return True

    def write_nowait(self, offset: int, segments: Sequence[memoryview]) -> bool:
        for segment in segments:
            self.content[offset : offset + len(segment)] = segment
            offset += len(segment)
        self.done.append(("write",))
        return True

    def flush_nowait(self) -> bool:
        self.done.append(("flush",))
        return True

    def discard_nowait(self, ranges: Sequence[tuple[int, int]]) -> bool:
        self.done.append(("discard", *ranges))
        return True

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        self.done.append(("zeroes", offset, length, unmap))
        return True

    async def read(self, *_: object) -> None:
        """Never, as all other reads are done at once."""
        raise AssertionError("nothing has to wait")

    write = flush = discard = write_zeroes = read


class _OneBurst:
    """In the place of a queue: one chain."""

    index = 0

    def __init__(self) -> None:
        self.chain: Chain

    async def bursts(self, **_: object) -> AsyncIterator[list[Chain]]:
        yield [self.chain]


class BlkRequests(ParserBench[BlkCase]):
    """Requests of disks."""

    def __init__(self) -> None:
        self._memory = ChainMemory()
        self._disk = ListedDisk()
        self._queue = _OneBurst()
        log = DeviceLog(logging.getLogger(__name__), "fuzz")
        self._servers: dict[tuple[bool, bool], BlockRequests] = {}
        for readonly in (False, True):
            for unmaps in (False, True):
                self._disk.readonly = readonly
                self._servers[readonly, unmaps] = BlockRequests(
                    cast("Any", self._disk), log, serial=SERIAL, unmaps=unmaps
                )
        self._requests: list[tuple[bytes, int]]
        self._nursery = cast("trio.Nursery", None)

    # ---- cases ---------------------------------------------------------------------------------------------------

    def begin(self, chance: random.Random) -> None:
        self._requests = [_request(chance) for _ in range(1024)]

    def make(self, draw: bytes) -> BlkCase:
        readable, room = self._requests[draw[0] << 2 & 0x3FC | draw[1] & 3]
        if draw[2] < 30:  # a number is another one
            changed = bytearray(readable)
            if changed:
                changed[draw[3] % len(changed)] = draw[4]
            readable = bytes(changed)
        if draw[2] > 225:
            readable = readable[: draw[3] % (len(readable) + 1)]
        if draw[5] < 40:
            room = _LENGTHS[draw[6] & 15]
        return BlkCase(_pieces(readable, 16, draw[7:12]), _lengths(room, draw[12:17]), draw[17] < 40, draw[18] < 200)

    # ---- the oracle ----------------------------------------------------------------------------------------------

    def run(self, made: BlkCase) -> None:
        disk, memory = self._disk, self._memory
        disk.readonly = made.readonly
        disk.content[:] = _CONTENT
        disk.done.clear()
        self._queue.chain = memory.chain(made.readable, made.writable)
        readable = b"".join(made.readable)
        expected = _expected(made, readable)
        try:
            serving = self._servers[made.readonly, made.unmaps].serve(cast("Queue", self._queue), self._nursery)
            try:
                serving.send(None)
            except StopIteration:
                pass
            else:
                serving.close()
                raise Found("differs", "a request waits, although its disk does not", "waits")
        except GuestError:
            if expected is not None:
                raise
        else:
            if expected is None:
                raise Found("differs", "a request without header or status is none", "take_request")
        self._compare(made, readable, expected or _NOTHING)

    def _compare(self, made: BlkCase, readable: bytes, expected: "_BlkOutcome") -> None:
        disk, memory = self._disk, self._memory
        if disk.done != expected.done:
            raise Found("differs", f"the disk is asked {disk.done}, where {expected.done} should be", "disk")
        if disk.content != expected.content:
            raise Found("differs", "the disk has other contents", "contents")
        if memory.completed != ([] if expected.used is None else [0, expected.used]):
            raise Found("differs", f"{memory.completed} is used, where {expected.used} should be", "used")
        whole = readable + expected.answer
        if expected.used is not None:
            whole = whole.ljust(len(readable) + sum(made.writable) - 1, b"\xee") + bytes((expected.status,))
        if memory.bytes != whole.ljust(SIZE, b"\xee"):
            raise Found("write", f"guest memory is not what it should be after {expected}"[:200], "guest memory")

    # ---- files ---------------------------------------------------------------------------------------------------

    def steps(self, made: BlkCase) -> list[Step]:
        readable = [{"do": "read", "data": data.hex()} for data in made.readable]
        writable = [{"do": "write", "size": size} for size in made.writable]
        return [{"do": "disk", "readonly": made.readonly, "unmaps": made.unmaps}, *readable, *writable]

    def of_steps(self, steps: Sequence[Step]) -> BlkCase:
        first, *others = steps
        if first["do"] != "disk":
            raise ValueError("the first step must be a disk")
        readable = [bytes.fromhex(step["data"]) for step in others if step["do"] == "read"]
        writable = [int(step["size"]) for step in others if step["do"] == "write"]
        if min([1, *writable, *map(len, readable)]) < 1 or sum(writable) + sum(map(len, readable)) > SIZE:
            raise ValueError(f"a chain has descriptors of 1 byte or more, {SIZE:#x} bytes together")
        return BlkCase(readable, writable, bool(first["readonly"]), bool(first["unmaps"]))

    def close(self) -> None:
        """There is nothing to close."""


class _BlkOutcome(NamedTuple):
    """Outcome of a request: contents of the disk, what it was asked, bytes for the guest, used length, status."""

    content: bytes
    done: list[tuple[object, ...]]
    answer: bytes
    used: int | None
    status: int


_NOTHING = _BlkOutcome(_CONTENT, [], b"", None, 0)


def _expected(case: BlkCase, readable: bytes) -> _BlkOutcome | None:
    """What 5.2.6 says of a request; None: it is none."""
    room = sum(case.writable) - 1
    if len(readable) < 16 or room < 0:
        return None
    (kind, _, sector), data = _HEADER.unpack_from(readable), readable[16:]

    def ended(status: int, answer: bytes = b"", content: bytes = _CONTENT, *done: tuple[object, ...]) -> _BlkOutcome:
        return _BlkOutcome(content, list(done), answer, len(answer) + (len(answer) == room), status)

    def lies_within(sectors: int, start: int = sector) -> bool:
        return start + sectors <= SECTORS

    begin = sector * _SECTOR
    if kind == 0:
        if room % _SECTOR or not lies_within(room // _SECTOR):
            return ended(_IOERR)
        return ended(_OK, _CONTENT[begin : begin + room], _CONTENT, ("read",))
    if kind == 1:
        if case.readonly or len(data) % _SECTOR or not lies_within(len(data) // _SECTOR):
            return ended(_IOERR)
        return ended(_OK, b"", _CONTENT[:begin] + data + _CONTENT[begin + len(data) :], ("write",))
    if kind == 4:
        return ended(_OK, b"", _CONTENT, ("flush",))
    if kind == 8:
        return ended(_OK, SERIAL.ljust(20, b"\0")[:room])
    if (kind == 11 and case.unmaps) or (kind == 13 and not case.readonly):
        return _of_segments(case, kind, data, ended, lies_within)
    return ended(_UNSUPP)


def _of_segments(case: BlkCase, kind: int, data: bytes, ended: Any, lies_within: Any) -> _BlkOutcome:
    most, known = (_MOST_SEGMENTS, 0) if kind == 11 else (1, 1)
    result: _BlkOutcome
    if len(data) % 16 or not 0 < len(data) // 16 <= most:
        result = ended(_IOERR)
        return result
    segments = list(_SEGMENT.iter_unpack(data))
    if any(flags & ~known for _, _, flags in segments):
        result = ended(_UNSUPP)
    elif any(count > _MOST_SECTORS or not lies_within(count, start) for start, count, _ in segments):
        result = ended(_IOERR)
    elif kind == 11:
        ranges = [(start * _SECTOR, count * _SECTOR) for start, count, _ in segments]
        result = ended(_OK, b"", _CONTENT, ("discard", *ranges))
    else:
        [(start, count, flags)] = segments
        unmap = bool(flags) and case.unmaps
        result = ended(_OK, b"", _CONTENT, ("zeroes", start * _SECTOR, count * _SECTOR, unmap))
    return result


def _request(chance: random.Random) -> tuple[bytes, int]:
    """What is readable, and how much room there is: mostly as it should be."""
    kind = chance.choice(_KINDS)
    sector = chance.choice(_PLACES) if chance.random() < 0.4 else chance.randrange(SECTORS)
    data, room = b"", 1
    if kind == 0:
        room = 1 + (chance.choice(_LENGTHS) if chance.random() < 0.3 else _SECTOR * chance.randrange(5))
    elif kind == 1:
        data = chance.randbytes(chance.choice(_LENGTHS) if chance.random() < 0.3 else _SECTOR * chance.randrange(5))
    elif kind == 8:
        room = 1 + chance.choice((0, 1, 19, 20, 20, 21, 512))
    elif kind in (11, 13):
        count = chance.choice((1, 1, 1, 1, 2, 15, 16, 17) if kind == 11 else (0, 1, 1, 1, 1, 2))
        few = chance.random() < 0.7
        data = b"".join(
            _SEGMENT.pack(
                chance.randrange(SECTORS) if few else chance.choice(_PLACES),
                chance.randrange(3) if few else chance.choice(_COUNTS),
                chance.choice(_SEGMENT_FLAGS) if chance.random() < (0.5 if kind == 13 else 0.1) else 0,
            )
            for _ in range(count)
        ) + bytes(chance.choice((0, 0, 0, 0, 0, 0, 1, 15)))
    return _HEADER.pack(kind, chance.getrandbits(32), sector) + data, room


def _pieces(data: bytes, first: int, draw: bytes) -> list[bytes]:
    """Cut into descriptors: mostly one for the header, and one for the data."""
    if not data:
        return []
    cuts = {first}
    if draw[0] > _VALID:
        cuts = {1 + draw[1] % len(data), 1 + draw[2] % len(data), 1 + draw[3]}
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def _lengths(room: int, draw: bytes) -> list[int]:
    """The same of the room, whose last byte is for the status."""
    return [len(piece) for piece in _pieces(bytes(room), room - 1 or 1, draw)]
