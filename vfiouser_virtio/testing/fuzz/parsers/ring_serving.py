"""Ways of a device to serve a buffer that it was given, and what guest memory should be afterwards."""

from collections.abc import Callable, Mapping
from functools import partial
from struct import Struct

from vfiouser_virtio.errors import AuthorError, GuestError
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.memory import Pieces, look_up
from vfiouser_virtio.testing.fuzz.parsers.ring_model import Buffer
from vfiouser_virtio.vring import Chain

_REQUEST_HEADER, _PACKET_HEADER = Struct("<IIQ"), Struct("<BBHHHHH")
_PATTERN = bytes(range(1, 256)) * 80
_MOST = len(_PATTERN) - 256

Way = Callable[[bytearray, Chain, Buffer, int, int], int]
"""With the expected bytes of guest memory, a number of bytes to be written, and which ones: the used length."""


def stamped(count: int, stamp: int) -> bytes:
    """Bytes to be written, others for each ``stamp``."""
    return _PATTERN[stamp & 0xFF : (stamp & 0xFF) + count]


def same(found: object, expected: object, what: str) -> None:
    """Raise `Found` where they differ."""
    if found != expected:
        raise Found("differs", f"{what}: {_shown(found)}, where {_shown(expected)} should be", what)


def pieces_of(address: int, length: int, *, write: bool = False) -> Pieces:
    """Where a range lies that is known to be memory."""
    found = look_up(address, length, write=write) if length else []
    assert not isinstance(found, str), found
    return found


def _complete(_expected: bytearray, chain: Chain, buffer: Buffer, count: int, _stamp: int) -> int:
    chain.complete(written := min(count, _room(buffer)))
    return written


def _copy(expected: bytearray, chain: Chain, buffer: Buffer, count: int, stamp: int) -> int:
    """Some bytes are read, and some are written."""
    begin = _readable(expected, buffer)
    part = chain.readable
    same(part.length, len(begin), "readable.length")
    same(part.read(min(count, len(begin))), begin[:count], "readable")
    rest = part.take(part.length)
    same(b"".join(rest), begin[count:], "rest of readable")
    same([view for view in rest if not view.readonly], [], "writable views of what is to be read")
    room = chain.writable.length
    data = stamped(min(count, room), stamp)
    chain.writable.write(data)
    _write(expected, buffer, 0, data)
    chain.complete()
    return len(data)


def _request(expected: bytearray, chain: Chain, buffer: Buffer, count: int, stamp: int) -> int:
    """`Chain.take_request`, as a disk does."""
    whole, room = _readable(expected, buffer), _room(buffer)
    try:
        fields, data, length, segments, left = chain.take_request(_REQUEST_HEADER)
    except GuestError:
        if len(whole) >= 16 and room:
            raise
        chain.complete(0)
        return 0
    if len(whole) < 16 or not room:
        raise Found("differs", "a request without header or status is none", "take_request")
    same(fields, _REQUEST_HEADER.unpack_from(whole), "header")
    same((length, b"".join(data)), (len(whole) - 16, whole[16:]), "data of a request")
    same((left, sum(map(len, segments))), (room - 1, room - 1), "room of a request")
    filled = min(count, left)
    content = stamped(filled, stamp)
    done = 0
    for segment in segments:
        part = content[done : done + len(segment)]
        segment[: len(part)] = part
        done += len(part)
    _write(expected, buffer, 0, content)
    chain.finish_request(status := count & 0xFF, filled)
    _write(expected, buffer, room - 1, bytes([status]))
    return filled + (filled == left)


def _packet(expected: bytearray, chain: Chain, buffer: Buffer, _count: int, _stamp: int) -> int:
    """`Chain.take_packet`, as a network device does."""
    whole = _readable(expected, buffer)
    fields, segments, length = chain.take_packet(_PACKET_HEADER)
    if len(whole) < _PACKET_HEADER.size:
        same((fields, length), ((), 0), "packet without header")
    else:
        same(fields, _PACKET_HEADER.unpack_from(whole), "header of a packet")
        same((length, b"".join(segments)), (len(whole) - 12, whole[12:]), "packet")
    chain.complete(0)
    return 0


def _fill(expected: bytearray, chain: Chain, buffer: Buffer, count: int, stamp: int) -> int:
    """`Chain.fill`, as a network device does; with more than there is room for, at times."""
    room, header, data = _room(buffer), stamped(12, stamp), stamped(min(count, _MOST), stamp)
    length = len(header) + len(data)
    try:
        chain.fill(header, [memoryview(data)], length)
    except AuthorError:
        if length <= room:
            raise
        _write(expected, buffer, 0, header if len(header) <= room else b"")
        chain.complete(0)
        return 0
    if length > room:
        raise Found("differs", f"{length:#x} bytes into {room:#x}", "fill")
    _write(expected, buffer, 0, header + data)
    return length


def _last_byte(expected: bytearray, chain: Chain, buffer: Buffer, count: int, stamp: int) -> int:
    """A status from the end, then something from the front."""
    room = _room(buffer)
    try:
        views = chain.writable.take_last(1)
    except GuestError:
        if room:
            raise
        chain.complete(0)
        return 0
    same(sum(map(len, views)), 1, "take_last")
    views[-1][:] = b"Z"
    _write(expected, buffer, room - 1, b"Z")
    data = stamped(min(count, room - 1), stamp)
    chain.writable.write(data)
    _write(expected, buffer, 0, data)
    chain.complete(len(data))
    return len(data)


def _lie(_expected: bytearray, chain: Chain, buffer: Buffer, count: int, _stamp: int) -> int:
    """More than there is room for, and twice: the device's author is told, the driver is not."""
    room = _room(buffer)
    for wrong in (room + 1 + count, -1):
        _refused(partial(chain.complete, wrong))
    chain.complete(room)
    _refused(chain.complete)
    return room


def _refused(work: Callable[[], object]) -> None:
    try:
        work()
    except AuthorError:
        return
    raise Found("differs", "what a device did wrong is not refused", "AuthorError")


def _shown(value: object) -> str:
    return value[:32].hex() if isinstance(value, bytes) else str(value)[:200]


def _readable(expected: bytearray, buffer: Buffer) -> bytes:
    return b"".join(
        expected[begin:end]
        for address, length in buffer.ranges[: buffer.writable_from]
        for begin, end in pieces_of(address, length)
    )


def _room(buffer: Buffer) -> int:
    return sum(length for _, length in buffer.ranges[buffer.writable_from :])


def _write(expected: bytearray, buffer: Buffer, skip: int, data: bytes) -> None:
    """What is written behind ``skip`` bytes of the writable part."""
    for address, length in buffer.ranges[buffer.writable_from :]:
        for begin, end in pieces_of(address, length, write=True):
            size = end - begin
            if skip >= size:
                skip -= size
                continue
            part = data[: size - skip]
            expected[begin + skip : begin + skip + len(part)] = part
            data, skip = data[len(part) :], 0
            if not data:
                return


WAYS: Mapping[str, Way] = {
    "complete": _complete,
    "copy": _copy,
    "request": _request,
    "packet": _packet,
    "fill": _fill,
    "last": _last_byte,
    "lie": _lie,
}
"""By name: ``how`` of ``serve``."""
