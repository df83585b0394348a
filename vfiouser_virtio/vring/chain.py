"""Descriptor chain as a device sees it: the buffers to read, the buffers to write, and no guest address in sight.

Who is at fault when a buffer is too short depends on what the device asks for. `read`, `take`, `take_last` and `parse`
say what a request must have, so the driver is (GuestError). `write` and `complete` say what the device has done: it
knows the `length` of its buffer, so its author is (AuthorError).

A long file, since a chain and its two parts are one thing, in two forms: as a whole and taken apart.
"""

from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

from construct import ConstructError

from vfiouser_virtio.errors import AuthorError, GuestError, Unmapped
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.pieces import Pieces, copy_into
from vfiouser_virtio.protocols.codec import parse, plain

if TYPE_CHECKING:
    from construct import Construct  # generic only in its stubs


Segments = Sequence[memoryview]
Request = tuple[tuple[Any, ...], Segments, int, Segments, int]
"""Fields of the header; data that the driver wrote, and their length; room for data, and its length."""

# Bytes of a page to write to for chains without buffers.
_NOWHERE = 1 << 16
# Numbers in the layout of three descriptors.
_THREE = 12
# From so many buffers on, views are made on demand only: a disk needs none.
_MANY = 8
_NO_REGION: HotRegion = (0, 0, memoryview(b""), memoryview(b""), 0)


class ChainOwner(Protocol):
    """Interface of the ring that a chain came from."""

    completed: list[int]
    on_push: Callable[[], None] | None

    def revalidate(self, chain: "Chain") -> None: ...


class Moved(Unmapped):
    """Other memory is mapped now where the buffers of a chain were when it was taken."""


class Readable:
    """Device-readable part of a chain, consumed from its front; how it is cut into descriptors does not show."""

    __slots__ = ("count", "length", "segments")

    segments: list[memoryview] | Pieces
    length: int
    """Bytes that have not been taken yet."""
    count: int
    """How many descriptors it had."""

    @staticmethod
    def of(segments: list[memoryview] | Pieces, length: int, count: int) -> "Readable":
        """The constructor, as `Chain.of`."""
        part = Readable()
        part.segments = segments
        part.length = length
        part.count = count
        return part

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as read-only views. Raises GuestError when there are fewer."""
        segments = self.take_pieces(count)
        return segments if isinstance(segments, list) else list(segments)

    def take_pieces(self, count: int) -> list[memoryview] | Pieces:
        """As `take`; where there are many, views are only made on demand. For the kernel: `iovec`."""
        if count == self.length:  # mostly the data of a request, whole
            segments, self.segments, self.length = self.segments, [], 0
            return segments
        _check_room(count, self.length, "readable")
        self.length -= count
        if self.segments and len(self.segments[0]) == count:  # mostly a header has a descriptor of its own
            return [self.segments.pop(0)]
        self.segments = list(self.segments)
        return _take_front(self.segments, count)

    def read(self, count: int | None = None) -> bytes:
        """Remove and copy ``count`` bytes, or all. Raises GuestError when there are fewer."""
        segments = self.take_pieces(self.length if count is None else count)
        return segments[0].tobytes() if len(segments) == 1 else b"".join(segments)


class Writable:
    """Device-writable part of a chain, filled from its front; a status field is taken off its end."""

    __slots__ = ("length", "segments", "status", "taken_last", "written")

    segments: list[memoryview] | Pieces
    length: int
    """Bytes that have not been taken or written yet."""
    taken_last: int
    """Bytes that were taken off the end."""
    written: int
    """Bytes written with `write`: the used length, unless `Chain.complete` is told another."""
    status: memoryview | None
    """Where `Chain.finish_request` stores the status, if that is not the last byte of the chain's last buffer."""

    @staticmethod
    def of(segments: list[memoryview] | Pieces, length: int) -> "Writable":
        """The constructor, as `Chain.of`."""
        part = Writable()
        part.segments = segments
        part.length = length
        part.taken_last = part.written = 0
        part.status = None
        return part

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as writable views, which the caller fills.

        Raises GuestError when there are fewer.
        """
        segments = self.take_pieces(count)
        return segments if isinstance(segments, list) else list(segments)

    def take_pieces(self, count: int) -> list[memoryview] | Pieces:
        """As `take`; where there are many, views are only made on demand. For the kernel: `iovec`."""
        if count == self.length:
            segments, self.segments, self.length = self.segments, [], 0
            return segments
        self._check_room(count)
        self.length -= count
        self.segments = list(self.segments)
        return _take_front(self.segments, count)

    def take_last(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the end, such as a request's status. Raises GuestError when there are fewer."""
        self._check_room(count)
        self.length -= count
        self.taken_last += count
        if self.segments and len(self.segments[-1]) == count:  # mostly it has a descriptor of its own
            return [self.segments.pop()]
        last = list(self.segments)
        self.segments = _take_front(last, self.length)
        return last

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to the front. Raises AuthorError when it does not fit: see `length`."""
        try:  # costs nothing where nothing is raised, as a comparison would
            segments = self.take_pieces(len(data))
        except GuestError:
            raise AuthorError(
                f"write() of {len(data):#x} bytes, where the driver's buffer has room for {self.length:#x} more"
            ) from None
        copy_into(segments, data)
        self.written += len(data)

    def write_all(self, pieces: Iterable[bytes | memoryview]) -> None:
        """`write` one piece behind the other."""
        for piece in pieces:
            self.write(piece)

    def _check_room(self, count: int) -> None:
        """Raises GuestError when there are fewer bytes than that, AuthorError where no driver can be at fault."""
        if self is NOTHING_TO_WRITE:
            raise AuthorError(f"{count:#x} bytes of a chain's writable part, after the chain was completed")
        _check_room(count, self.length, "writable")


class Chain:
    """Buffer that the driver has made available, until `complete` gives it back.

    Rings make hundreds of thousands of them in a second, so it is one object: its two parts, and the views of
    guest memory in them, are made when they are first asked for. `take_request` can do without.
    """

    __slots__ = (
        "_readable",
        "_region",
        "_writable",
        "head",
        "layout",
        "ring",
        "room",
        "slots",
        "stale",
        "writable_from",
    )

    ring: ChainOwner | None
    """None when it was completed."""
    head: int
    """Which descriptor it starts at, packed: its buffer id. For messages, and as an identity while in flight."""
    layout: Sequence[int]
    """Address and length of each descriptor, and two more numbers, which differ: see `ranges`."""
    writable_from: int
    """Index into `ranges` of the first writable one."""
    room: int
    """Bytes that the driver offers to be written."""
    slots: int
    """How many descriptors of a packed ring it takes; of a split one this is not known."""
    stale: bool
    """The memory map has changed since the chain was taken: look again before its buffers are touched."""
    _region: HotRegion | None
    _readable: Readable | None
    _writable: Writable | None

    @staticmethod
    def of(
        ring: ChainOwner | None,
        head: int,
        layout: Sequence[int],
        writable_from: int,
        room: int,
        region: HotRegion | None,
        slots: int = 1,
        segments: tuple[list[memoryview], list[memoryview]] = ([], []),
    ) -> "Chain":
        """``region`` is where all buffers lie, each with one byte at least; else ``segments`` are the two parts.

        The constructor: an ``__init__`` is called through C before Python 3.13, and takes 0.1 µs longer.
        """
        chain = Chain()
        chain.ring = ring
        chain.head = head
        chain.layout = layout
        chain.writable_from = writable_from
        chain.room = room
        chain.slots = slots
        chain.stale = False
        chain._region = region
        if region is None:
            readable, writable = segments
            chain._readable = Readable.of(readable, sum(map(len, readable)), writable_from)
            chain._writable = Writable.of(writable, room)
        else:
            chain._readable = chain._writable = None
        return chain

    @property
    def readable(self) -> Readable:
        """What the driver wrote for the device. Raises Unmapped when its memory has gone meanwhile."""
        if self.stale:
            self._look_again()
        part = self._readable
        return self._make_parts()[0] if part is None else part

    @property
    def writable(self) -> Writable:
        """What the device may write for the driver, until `complete`. Raises Unmapped as `readable`."""
        if self.ring is None:
            return NOTHING_TO_WRITE
        if self.stale:
            self._look_again()
        part = self._writable
        if part is None:
            layout, region = self.layout, self._region
            if self.writable_from or len(layout) != 4 or region is None:
                return self._make_parts()[1]
            # One buffer to be filled, what `_make_parts` does in twice the time.
            start, length = layout[0] - region[4], layout[1]
            part = self._writable = Writable.of([region[2][start : start + length]], length)
            self._readable = _NO_DATA
        return part

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Guest (address, length) pairs, readable ones first: for pinning them; a device has no other use for them."""
        return list(zip(self.layout[::4], self.layout[1::4], strict=True))

    def parse(self, schema: "Construct[Any, Any]") -> Any:
        """Take as many readable bytes as ``schema`` has and parse them.

        Raises GuestError when the chain is too short or its bytes do not fit the schema.
        """
        known = plain(schema)
        data = self.readable.read(schema.sizeof() if known is None else known[1].size)
        try:
            return parse(schema, data)
        except ConstructError as error:
            raise GuestError(f"request {data.hex()} is not a valid {schema.name or 'structure'}: {error}") from error

    def take_request(self, header: Struct) -> Request:
        """Take the chain apart as most types lay their requests out: a header, data either way, and a status byte.

        ``header`` is the codec of what the readable part begins with; the status is the last byte of the writable one,
        for `finish_request` to store. How the driver has cut them does not show; with a buffer for each, as is usual,
        this takes a third of the time of `readable` and `writable`, which are of no use afterwards. Raises GuestError
        when one of them is too short, AuthorError when the chain was completed.
        """
        region = self._region
        if (
            region is None or self.stale or self._readable is not None or self._writable is not None
        ) or self.ring is None:
            return self._take_request(header)
        layout, count, size = self.layout, self.writable_from, header.size
        _, _, view, readonly_view, origin = region
        if len(layout) == _THREE:
            at_header, header_size, _, _, start, length, _, _, _, last, _, _ = layout
            if header_size == size and last == 1:
                fields = header.unpack_from(view, at_header - origin)
                start -= origin
                if count == 1:
                    return fields, (), 0, (view[start : start + length],), length
                if count == 2:
                    return fields, (readonly_view[start : start + length],), length, (), 0
        elif count and layout[1] == size and 4 * count < len(layout) and layout[-3] == 1:
            fields, first = header.unpack_from(view, layout[0] - origin), 4 * count
            if count == 1:
                return fields, (), 0, _cut(view, origin, layout[4:-4]), self.room - 1
            sizes = layout[5:first:4]
            return (
                fields,
                _cut(readonly_view, origin, layout[4:first]),
                sum(sizes),
                _cut(view, origin, layout[first:-4]),
                self.room - 1,
            )
        return self._take_request(header)

    def _take_request(self, header: Struct) -> Request:
        """For any chain."""
        if self.ring is None:
            raise AuthorError(f"take_request() of chain {self.head:#x} after it was completed")
        readable = self.readable
        fields = header.unpack(readable.read(header.size))
        writable = self.writable
        [writable.status] = writable.take_last(1)
        length, room = readable.length, writable.length
        return fields, readable.take_pieces(length), length, writable.take_pieces(room), room

    def take_packet(self, header: Struct) -> tuple[tuple[Any, ...], Segments, int]:
        """Take the readable part apart as a header and what follows it: the header's fields, the rest, its length.

        With one buffer for both, as is usual, this takes a third of the time of `readable`, which is of no use
        afterwards. The rest are read-only views. No fields, and nothing else, where there is no whole header.
        """
        region, layout, size = self._region, self.layout, header.size
        if len(layout) == 4 and region is not None and self.writable_from and self._readable is None and not self.stale:
            start, length, _, _ = layout
            start -= region[4]
            if length >= size and self.ring is not None:
                fields = header.unpack_from(region[2], start)
                return fields, (region[3][start + size : start + length],), length - size
        readable = self.readable
        if readable.length < size:
            return (), (), 0
        fields = header.unpack(readable.read(size))
        length = readable.length
        return fields, readable.take(length), length

    def finish_request(self, status: int, filled: int = 0) -> None:
        """Store the status of a request that was taken with `take_request`, and `complete` the chain.

        ``filled`` counts the bytes from the start of the room for data. They are the used length, which counts the
        status as well when all of the room was filled: there must be no gap in front of what it counts (2.7.8.1).
        Raises AuthorError as `complete`. The chain must be pinned, or have been taken since the last await.
        """
        room = self.room - 1
        if filled > room or filled < 0:
            raise AuthorError(
                f"finish_request() of chain {self.head:#x} with {filled:#x} bytes of data, where the driver's buffer "
                f"has room for {self.room:#x} bytes, the status included"
            )
        ring, part, region = self.ring, self._writable, self._region
        if ring is not None and ring is not DISOWNED:
            if part is not None and part.status is not None:
                part.status[0] = status
            elif region is not None:
                region[2][self.layout[-4] + self.layout[-3] - 1 - region[4]] = status
        self.complete(filled + 1 if filled == room else filled)

    def fill(self, header: bytes, segments: Segments, length: int) -> None:
        """Write a header and what follows it to the front, ``length`` bytes together, and `complete` the chain.

        With one buffer, as is usual for what a device has to say by itself, this takes a third of the time of
        `Writable.write`. Raises AuthorError for more than the driver gave room for, and as `complete`.
        """
        region, layout = self._region, self.layout
        if (
            region is None or self.stale or self._writable is not None or len(layout) != 4 or self.writable_from
        ) or length > self.room:
            writable = self.writable
            writable.write(header)
            writable.write_all(segments)
        elif self.ring is not None:
            view = region[2]
            at = layout[0] - region[4]
            end = at + len(header)
            view[at:end] = header
            for segment in segments:
                at = end
                end += len(segment)
                view[at:end] = segment
        self.complete(length)

    def complete(self, written: int | None = None) -> None:
        """Put the chain into the used ring; ``written`` counts the bytes from the start of the writable part.

        By default what `Writable.write` wrote. Raises AuthorError for more than the driver gave room for, which would
        make it take old bytes of its memory for the device's, and for a second call.
        """
        if written is None:
            written = 0 if self._writable is None else self._writable.written
        elif written > self.room or written < 0:  # 0 <= … <= … takes twice as long
            raise AuthorError(
                f"complete({written:#x}) of chain {self.head:#x}, "
                f"where the driver's buffer has room for {self.room:#x} bytes"
            )
        ring, self.ring = self.ring, None
        if ring is None:
            raise AuthorError(f"chain {self.head:#x} completed twice")
        completed = ring.completed
        completed.append(self.head)
        completed.append(written)
        if (on_push := ring.on_push) is not None:
            on_push()

    def is_unmapped(self) -> bool:
        """Whether the chain's memory is not mapped at the moment; nothing of it may be touched then.

        False where other memory is mapped there since: that does not pass, and an access to the chain raises.
        """
        if not self.stale:
            return False
        try:
            self._look_again()
        except Moved:
            return False
        except Unmapped:
            return True
        return False

    def touched(self) -> list[tuple[int, int]]:
        """(begin, end) of what was taken of the writable part, from its front and off its end."""
        part, room = self._writable, self.room
        if part is None:
            return [(0, room)] if self._region is None else [(0, 0), (room, room)]
        front, back = room - part.taken_last - part.length, room - part.taken_last
        return [(0, room)] if front == back else [(0, front), (back, room)]

    def is_within(self, homes: set[int]) -> bool:
        """Whether every byte that has not been taken yet is part of these objects (``id(view.obj)``), or a copy."""
        readable, writable = self._readable, self._writable
        if readable is None or writable is None:
            readable, writable = self._make_parts()
        views = [*readable.segments, *writable.segments]
        return all(id(view.obj) in homes or isinstance(view.obj, bytes | bytearray) for view in views)

    def drop_buffers(self) -> None:
        """The queue was reset: nothing is left to be read, and what is written goes nowhere.

        No error: a device may be in the middle of it without fault, and it must go on with its other queues.
        """
        length = self.room if self._writable is None else self._writable.length
        # A driver can name 4 GiB: it is the same page again and again.
        whole, rest = divmod(length, _NOWHERE)
        nowhere = memoryview(bytearray(_NOWHERE))
        self._region = None
        self._readable = Readable.of([], 0, self.writable_from)
        part = self._writable = Writable.of([nowhere] * whole + ([nowhere[:rest]] if rest else []), length)
        part.status = nowhere[:1]

    def disown(self) -> None:
        """The buffer is offered again, as another chain: nothing is left of this one, and completing it is void."""
        self.ring = DISOWNED
        self.stale = True

    def _make_parts(self) -> tuple[Readable, Writable]:
        """Both at once: a device that looks at one mostly looks at the other. The usual shapes by hand."""
        layout, count = self.layout, self.writable_from
        _, _, view, readonly_view, origin = self._region or _NO_REGION
        if len(layout) == 4 and count:
            start, length = layout[0] - origin, layout[1]
            parts = Readable.of([readonly_view[start : start + length]], length, 1), _NO_ROOM
        elif len(layout) != _THREE or not 0 < count < 3:
            parts = self._parts_of_many()  # apart, since with a comprehension in it a call takes longer
        else:
            start, length, _, _, second, size, _, _, third, last, _, _ = layout
            start -= origin
            second -= origin
            third -= origin
            front, back = readonly_view[start : start + length], view[third : third + last]
            if count == 1:
                parts = (
                    Readable.of([front], length, 1),
                    Writable.of([view[second : second + size], back], size + last),
                )
            else:
                parts = (
                    Readable.of([front, readonly_view[second : second + size]], length + size, 2),
                    Writable.of([back], last),
                )
        self._readable, self._writable = parts
        return parts

    def _parts_of_many(self) -> tuple[Readable, Writable]:
        _, _, view, readonly_view, origin = self._region or _NO_REGION
        layout, first = self.layout, 4 * self.writable_from
        return (
            Readable.of(_cut(readonly_view, origin, layout[:first]), sum(layout[1:first:4]), self.writable_from),
            Writable.of(_cut(view, origin, layout[first:]), self.room),
        )

    def _look_again(self) -> None:
        if self.ring is not None:
            self.ring.revalidate(self)
        self.stale = False


class _Disowned:
    """The ring of chains that are none any more: it forgets at once which of them were completed."""

    def __init__(self) -> None:
        self.completed: list[int] = []
        self.on_push: Callable[[], None] | None = self.completed.clear

    def revalidate(self, chain: Chain) -> None:
        chain.drop_buffers()


DISOWNED = _Disowned()

SINGLE = Chain.of(None, 0, (), 0, 0, None)
"""In the place of a chain in flight: a buffer that `Ring.pop_singles` has handed out without making a chain of it."""

# Parts without a buffer: nothing can be taken of them, so they never change.
_NO_DATA, _NO_ROOM = Readable.of([], 0, 0), Writable.of([], 0)
# The writable part of a chain that was completed.
NOTHING_TO_WRITE = Writable.of([], 0)


def _check_room(count: int, length: int, kind: str) -> None:
    # Less than none: a device has reckoned with a length that a request claims to have.
    if not 0 <= count <= length:
        raise GuestError(f"a request needs {count:#x} more {kind} bytes, its buffer has {length:#x}")


def _take_front(segments: list[memoryview], count: int) -> list[memoryview]:
    """Remove ``count`` bytes from the front of ``segments``, which has as many."""
    whole = 0
    for segment in segments:
        if count < len(segment):
            break
        count -= len(segment)
        whole += 1
    front = segments[:whole]
    del segments[:whole]
    if count:
        front.append(segments[0][:count])
        segments[0] = segments[0][count:]
    return front


def _cut(view: memoryview, origin: int, layout: Sequence[int]) -> list[memoryview] | Pieces:
    """The buffers of a part of a `Chain.layout`, in a view of the memory from ``origin`` on."""
    if len(layout) >= 4 * _MANY:
        return Pieces(view, [address - origin for address in layout[::4]], list(layout[1::4]))
    # `Pieces` would do as well, but take twice as long to be made and looked through.
    return [
        view[(start := address - origin) : start + size]
        for address, size in zip(layout[::4], layout[1::4])  # noqa: B905 - strict takes longer
    ]
