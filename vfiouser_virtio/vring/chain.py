"""A descriptor chain as a device sees it: the buffers to read, the buffers to write, and no guest address in sight.

Who is at fault when a buffer is too short depends on what the device asks for. `read`, `take`, `take_last` and `parse`
say what a request must have, so the driver is (GuestError). `write` and `complete` say what the device has done: it
knows the `length` of its buffer, so its author is (AuthorError).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from construct import ConstructError

from vfiouser_virtio.errors import AuthorError, GuestError, Unmapped
from vfiouser_virtio.pieces import Pieces

if TYPE_CHECKING:
    from construct import Construct  # generic only in its stubs


# Bytes of a page to write to for chains without buffers.
_NOWHERE = 1 << 16


class Ring(Protocol):
    """What a chain needs of the ring that it came from."""

    completed: list[int]
    on_push: Callable[[], None] | None

    def revalidate(self, chain: "Chain") -> None: ...


class Moved(Unmapped):
    """Other memory is mapped now where the buffers of a chain were when it was taken."""


class Readable:
    """The device-readable part of a chain, consumed from its front; how it is cut into descriptors does not show."""

    __slots__ = ("count", "length", "segments")

    segments: list[memoryview] | Pieces
    length: int
    """Bytes that have not been taken yet."""
    count: int
    """How many descriptors it had."""

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as read-only views. Raises GuestError when there are fewer."""
        segments = self.take_pieces(count)
        return segments if isinstance(segments, list) else list(segments)

    def take_pieces(self, count: int) -> list[memoryview] | Pieces:
        """As `take`; where there are many, views are only made if somebody looks at them. For the kernel: `iovec`."""
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
    """The device-writable part of a chain, filled from its front; a status field is taken off its end."""

    __slots__ = ("length", "segments", "taken_last", "written")

    segments: list[memoryview] | Pieces
    length: int
    """Bytes that have not been taken or written yet."""
    taken_last: int
    """Bytes that were taken off the end."""
    written: int
    """Bytes written with `write`: the used length, unless `Chain.complete` is told another."""

    def take(self, count: int) -> list[memoryview]:
        """Remove ``count`` bytes from the front, as writable views: whoever takes them fills them.

        Raises GuestError when there are fewer.
        """
        segments = self.take_pieces(count)
        return segments if isinstance(segments, list) else list(segments)

    def take_pieces(self, count: int) -> list[memoryview] | Pieces:
        """As `take`; where there are many, views are only made if somebody looks at them. For the kernel: `iovec`."""
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

    def _check_room(self, count: int) -> None:
        """Raises GuestError when there are fewer bytes than that, AuthorError where no driver can be at fault."""
        if self is NOTHING_TO_WRITE:
            raise AuthorError(f"{count:#x} bytes of a chain's writable part, after the chain was completed")
        _check_room(count, self.length, "writable")


class Chain(Writable):
    """One buffer that the driver has made available, until `complete` gives it back.

    Rings make half a million to two million of them in a second, so what is odd here is what it costs otherwise, in
    parts of all that is done for a buffer: there is no ``__init__``, rings set the attributes (10 %); a chain is its
    own writable part (15 %); `readable` and `writable` are attributes, not properties (6 % each): those are in another
    class, `_StaleChain`, which a chain belongs to while it is `stale`.
    """

    __slots__ = ("head", "layout", "readable", "ring", "slots", "writable")

    readable: Readable
    """What the driver wrote for the device. Raises Unmapped when its memory has gone meanwhile."""
    writable: Writable
    """What the device may write for the driver: the chain itself, until `complete`. Raises Unmapped as `readable`."""
    ring: Ring | None
    """None when it was completed."""
    head: int
    """Which descriptor it starts at, packed: its buffer id. For messages, and as an identity while it is in flight."""
    layout: Sequence[int]
    """Address and length of each descriptor, and two more numbers, which differ: see `ranges`."""
    slots: int
    """How many descriptors of a packed ring it takes; of a split one this is not known."""

    @property
    def stale(self) -> bool:
        """The memory map has changed since the chain was taken: look again before its buffers are touched."""
        return type(self) is _StaleChain

    @stale.setter
    def stale(self, stale: bool) -> None:
        object.__setattr__(self, "__class__", _StaleChain if stale else Chain)  # the same slots, but for two properties

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Guest (address, length) pairs, readable ones first: for pinning them; a device has no other use for them."""
        return list(zip(self.layout[::4], self.layout[1::4], strict=True))

    @property
    def writable_from(self) -> int:
        """Index into `ranges` of the first writable one."""
        return _readable(self).count

    @property
    def total(self) -> int:
        """Bytes that the driver offers to be written."""
        return sum(length for _, length in self.ranges[self.writable_from :])

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

        By default what `Writable.write` wrote. Raises AuthorError for more than the driver gave room for, which would
        make it take old bytes of its memory for the device's, and for a second call.
        """
        if written is None:
            written = self.written
        # With what is left, which is mostly all: a sum over the descriptors costs 20 times that, and 0 <= … <= … twice.
        elif written > self.length or written < 0:
            self._check_written(written)
        ring, self.ring = self.ring, None
        if ring is None:
            raise AuthorError(f"chain {self.head:#x} completed twice")
        self.writable = NOTHING_TO_WRITE  # as in `let_go`
        ring.completed += self.head, written
        if (on_push := ring.on_push) is not None:
            on_push()

    def _check_written(self, written: int) -> None:
        room = self.total
        if not 0 <= written <= room:
            chain = f"chain {self.head:#x}"
            raise AuthorError(
                f"complete({written:#x}) of {chain}, where the driver's buffer has room for {room:#x} bytes"
            )

    def is_away(self) -> bool:
        """Whether the chain's memory is not mapped at the moment; nothing of it may be touched then.

        False where other memory is mapped there since: that does not pass, and whoever touches the chain is told.
        """
        try:
            _ = self.readable
        except Moved:
            return False
        except Unmapped:
            return True
        return False

    def touched(self) -> list[tuple[int, int]]:
        """(begin, end) of what was taken of the writable part, from its front and off its end."""
        total = self.total
        front, back = total - self.taken_last - self.length, total - self.taken_last
        return [(0, total)] if front == back else [(0, front), (back, total)]

    def lies_in(self, homes: set[int]) -> bool:
        """Whether every byte that has not been taken yet is part of these objects (``id(view.obj)``), or a copy."""
        views = [*_readable(self).segments, *self.segments]
        return all(id(view.obj) in homes or isinstance(view.obj, bytes | bytearray) for view in views)

    def lose_buffers(self) -> None:
        """The queue was reset: nothing is left to be read, and what is written goes nowhere.

        No error: nobody is at fault when a device is in the middle of it, and it must go on with its other queues.
        """
        self.readable = _nothing_to_read(self.writable_from)
        # A driver can name 4 GiB: it is the same page again and again.
        whole, rest = divmod(self.length, _NOWHERE)
        nowhere = memoryview(bytearray(_NOWHERE))
        self.writable = _writable([nowhere] * whole + [nowhere[:rest]] * bool(rest), self.length)
        self.segments = []

    def disown(self) -> None:
        """The buffer is offered again, as another chain: nothing is left of this one, and completing it is void."""
        self.ring = DISOWNED
        self.let_go()

    def let_go(self) -> None:
        """The queue was reset: `lose_buffers` as soon as somebody wants to have them."""
        self.stale = True
        self.writable = NOTHING_TO_WRITE  # a chain that refers to itself is left to the garbage collector


class _Disowned:
    """The ring of chains that are none any more."""

    on_push: Callable[[], None] | None = None

    @property
    def completed(self) -> list[int]:
        return []

    @completed.setter
    def completed(self, used: list[int]) -> None:
        """Nobody is told."""

    def revalidate(self, chain: Chain) -> None:
        chain.lose_buffers()


DISOWNED = _Disowned()

_readable: Callable[[Chain], Readable] = Chain.__dict__["readable"].__get__
"""Also of a stale chain."""


class _StaleChain(Chain):
    """A chain whose memory may have moved, until somebody wants to have its buffers."""

    __slots__ = ()

    if not TYPE_CHECKING:  # to which an attribute that becomes a property is a mistake

        @property
        def readable(self) -> Readable:
            self._look_again()
            return self.readable

        @readable.setter
        def readable(self, part: Readable) -> None:
            Chain.__dict__["readable"].__set__(self, part)

        @property
        def writable(self) -> Writable:
            self._look_again()
            return self.writable

        @writable.setter
        def writable(self, part: Writable) -> None:
            Chain.__dict__["writable"].__set__(self, part)

    def _look_again(self) -> None:
        if self.ring is not None:
            self.ring.revalidate(self)
        self.stale = False


def _nothing_to_read(count: int) -> Readable:
    part = Readable()
    part.segments, part.length, part.count = [], 0, count
    return part


def _writable(segments: list[memoryview], length: int) -> Writable:
    part = Writable()
    part.segments, part.length, part.taken_last, part.written = segments, length, 0, 0
    return part


# The parts of all chains that have none: nothing can be taken of them, so they never change.
NOTHING_TO_READ = _nothing_to_read(0)
NOTHING_TO_WRITE = _writable([], 0)


def copy_into(segments: Sequence[memoryview], data: bytes | bytearray | memoryview) -> None:
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
