"""A descriptor chain as a device sees it: the buffers to read, the buffers to write, and no guest address in sight."""

from typing import TYPE_CHECKING, Any, Protocol

from construct import ConstructError

from vfiouser_virtio.errors import GuestError, Unmapped

if TYPE_CHECKING:
    from construct import Construct  # generic only in its stubs


class Memory(Protocol):
    """What the rings need of guest memory: views of a range (see `vfiouser_virtio.memory.GuestMemory`)."""

    def readable(self, address: int, length: int) -> list[memoryview]: ...

    def writable(self, address: int, length: int) -> list[memoryview]: ...


class Ring(Protocol):
    """What a chain needs of the ring that it came from."""

    def push(self, chain: "Chain", written: int) -> None: ...

    def revalidate(self, chain: "Chain") -> None: ...


class Readable:
    """The device-readable part of a chain, consumed from its front; how it is cut into descriptors does not show."""

    __slots__ = ("length", "segments")

    def __init__(self, segments: list[memoryview], length: int) -> None:
        self.segments = segments
        self.length = length
        """Bytes that have not been taken yet."""

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as read-only views. Raises GuestError when there are fewer."""
        if count == self.length:  # mostly the data of a request, whole
            segments, self.segments, self.length = self.segments, [], 0
            return segments
        _check_room(count, self.length, "readable")
        self.length -= count
        taken, self.segments = _split(self.segments, count)
        return taken

    def read(self, count: int | None = None) -> bytes:
        """Remove and copy ``count`` bytes, or all. Raises GuestError when there are fewer."""
        segments = self.take(self.length if count is None else count)
        return bytes(segments[0]) if len(segments) == 1 else b"".join(segments)


class Writable:
    """The device-writable part of a chain, filled from its front; a status field is taken off its end."""

    __slots__ = ("length", "segments", "taken_last", "total", "written")

    def __init__(self, segments: list[memoryview], length: int) -> None:
        self.segments = segments
        self.length = length
        """Bytes that have not been taken or written yet."""
        self.total = length
        """Bytes that the driver offers."""
        self.taken_last = 0
        """Bytes that were taken off the end."""
        self.written = 0
        """Bytes written with `write`: the used length, unless `Chain.complete` is told another."""

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as writable views: whoever takes them fills them.

        Raises GuestError when there are fewer.
        """
        if count == self.length:
            segments, self.segments, self.length = self.segments, [], 0
            return segments
        _check_room(count, self.length, "writable")
        self.length -= count
        taken, self.segments = _split(self.segments, count)
        return taken

    def take_last(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the end, such as a request's status. Raises GuestError when there are fewer."""
        _check_room(count, self.length, "writable")
        self.length -= count
        self.taken_last += count
        self.segments, taken = _split(self.segments, self.length)
        return taken

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to the front. Raises GuestError when it does not fit."""
        copy_into(self.take(len(data)), data)
        self.written += len(data)


class Chain:
    """One buffer that the driver has made available, until `complete` gives it back."""

    __slots__ = ("_readable", "_ring", "_writable", "head", "ranges", "stale", "writable_from")

    def __init__(
        self,
        ring: "Ring",
        head: int,
        ranges: list[tuple[int, int]],
        writable_from: int,
        parts: tuple[Readable, Writable],
    ) -> None:
        self._ring: Ring | None = ring
        self._readable, self._writable = parts
        self.head = head
        """Which descriptor it starts at: for messages and as an identity while it is in flight."""
        self.ranges = ranges
        """Guest (address, length) pairs, readable ones first: for pinning them; a device has no other use for them."""
        self.writable_from = writable_from
        """Index into `ranges` of the first writable one."""
        self.stale = False
        """The memory map has changed since the chain was taken: look again before its buffers are touched."""

    @property
    def readable(self) -> Readable:
        """What the driver wrote for the device. Raises Unmapped when its memory has gone meanwhile."""
        if self.stale:
            self._look_again()
        return self._readable

    @property
    def writable(self) -> Writable:
        """What the device may write for the driver. Raises Unmapped when its memory has gone meanwhile."""
        if self.stale:
            self._look_again()
        return self._writable

    def parse(self, schema: "Construct[Any, Any]") -> Any:
        """Take as many readable bytes as ``schema`` has and parse them.

        Raises GuestError when the chain is too short or its bytes do not fit the schema.
        """
        data = self.readable.read(schema.sizeof())
        try:
            return schema.parse(data)
        except ConstructError as error:
            raise GuestError(f"request {data.hex()} is not a valid {schema.name or 'structure'}: {error}") from error

    def complete(self, written: int | None = None) -> None:
        """Put the chain into the used ring; ``written`` counts the bytes from the start of the writable part.

        By default what `Writable.write` wrote. A second call is a bug of the device and raises RuntimeError.
        """
        ring, self._ring = self._ring, None
        if ring is None:
            raise RuntimeError(f"chain {self.head:#x} completed twice")
        ring.push(self, self._writable.written if written is None else written)

    def is_away(self) -> bool:
        """Whether the chain's memory is not mapped at the moment; nothing of it may be touched then."""
        try:
            if self.stale:
                self._look_again()
        except Unmapped:
            return True
        return False

    def touched(self) -> list[tuple[int, int]]:
        """(begin, end) of what was taken of the writable part, from its front and off its end."""
        part = self._writable
        front, back = part.total - part.taken_last - part.length, part.total - part.taken_last
        return [(0, part.total)] if front == back else [(0, front), (back, part.total)]

    def lies_in(self, homes: set[int]) -> bool:
        """Whether every byte that has not been taken yet is part of these objects (``id(view.obj)``), or a copy."""
        views = [*self._readable.segments, *self._writable.segments]
        return all(id(view.obj) in homes or isinstance(view.obj, bytes | bytearray) for view in views)

    def _look_again(self) -> None:
        if self._ring is not None:
            self._ring.revalidate(self)
        self.stale = False


def copy_into(segments: list[memoryview], data: bytes | bytearray | memoryview) -> None:
    """Spread ``data`` over segments that are together at least as long."""
    if len(segments) == 1:
        segments[0][: len(data)] = data
        return
    position = 0
    for segment in segments:
        count = min(len(segment), len(data) - position)
        segment[:count] = data[position : position + count]
        position += count


def _check_room(count: int, length: int, kind: str) -> None:
    if not 0 <= count <= length:
        raise GuestError(f"a request needs {count:#x} more {kind} bytes, its buffer has {length:#x}")


def _split(segments: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    front = []
    for index, segment in enumerate(segments):
        if count < len(segment):
            if count:
                front.append(segment[:count])
            return front, [segment[count:], *segments[index + 1 :]]
        front.append(segment)
        count -= len(segment)
    return front, []
