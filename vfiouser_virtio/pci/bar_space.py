"""Accesses of a BAR, given to the registers and memories that lie there.

::

    offset    0x00    0x04    0x08 … 0x0f      0x10       0x40
              ident   ctrl    address (64 bit) (nothing)  memory …
    read 4 @0x04      ─▶ ctrl: one look into a table
    read 4 @0x0c      ─▶ the upper half of address
    read 2 @0x06      ─▶ bytes 2 and 3 of ctrl
    write 8 @0x00     ─▶ ident, then ctrl
    read 4 @0x20      ─▶ not modelled: what the device's `unmodelled` says
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError, PeerError
from vfiouser_virtio.pci.bar_part import BarPart, checked_widths
from vfiouser_virtio.pci.bars import BarKind, check_bar
from vfiouser_virtio.pci.register import Register
from vfiouser_virtio.protocols.codec import NUMBERS
from vfiouser_virtio.protocols.pci import STD_NUM_BARS
from vfiouser_virtio.vfio_device import AnswerLater, Buffer

MAX_PARTS = 1024
"""Registers and memories that one access may touch: a processor's touches a few. A client's could reach 65,536, and run
all their hooks, for half a second in which no other device is served. A write of so many takes some 2 ms."""


_NOT_PLAIN = Register(0)
_NOT_PLAIN.size = -1
"""In the place of a register that has more to do in a read: no access has its size."""


class Unmodelled(Protocol):
    """Answer to accesses of what is not there."""

    def read(self, bar: int, offset: int, count: int) -> bytes:
        """``count`` bytes."""
        ...

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """The bytes go nowhere."""
        ...


class BarDeclaration:
    """Declaration made by `bar`."""

    def __init__(self, index: int, size: int, kind: BarKind, prefetchable: bool, widths: Collection[int]) -> None:
        if not isinstance(kind, BarKind):
            raise AuthorError(f"bar({index}): kind={kind!r}: expected BarKind.MEM32, MEM64 or IO")
        self.registers = range(index, index + (2 if kind is BarKind.MEM64 else 1))
        """The base address registers that it takes."""
        if index < 0 or self.registers[-1] >= STD_NUM_BARS:
            raise AuthorError(f"bar({index}): a {kind.value} BAR has index 0 to {STD_NUM_BARS - len(self.registers)}")
        try:
            check_bar(size, kind, prefetchable)
        except ValueError as error:
            raise AuthorError(f"bar({index}): {error}") from None
        self.index, self.size, self.kind, self.prefetchable = index, size, kind, prefetchable
        self.widths = checked_widths(widths)


def bar(
    index: int,
    *,
    size: int,
    kind: BarKind = BarKind.MEM32,
    prefetchable: bool = False,
    widths: Collection[int] = (),
) -> BarDeclaration:
    """Declaration of BAR ``index`` in the body of a `PciDevice`: the registers below it lie in it, until the next.

    ``size`` is a power of two. ``widths`` are the numbers of bytes that an access may have, at a multiple of that,
    where not all are allowed: others are logged, read as all-ones, and are lost when they write. AuthorError for what
    PCI does not have.
    """
    return BarDeclaration(index, size, kind, prefetchable, widths)


class BarSpace:
    """BAR of a device with its ``parts``; ``failed`` is told what has raised an exception in the author's code."""

    def __init__(
        self,
        declared: BarDeclaration,
        parts: Sequence[BarPart],
        log: DeviceLog,
        unmodelled: Unmodelled,
        failed: Callable[[str, Exception], None],
    ) -> None:
        self.index = declared.index
        self.parts = sorted(parts, key=lambda part: part.offset)
        self._starts = [part.offset for part in self.parts]
        self._widths = declared.widths
        self._have_widths = any(part.widths for part in parts)
        self.accesses = 0
        """How often a driver has read or written here."""
        self.last_write: BarPart | None = None
        """What it has written last."""
        self._log, self._unmodelled, self._failed = log, unmodelled, failed
        for part, following in zip(self.parts, self.parts[1:], strict=False):
            if part.end > following.offset:
                raise AuthorError(f"{part.name} ({part.offset:#x} to {part.end - 1:#x}) and {following.name} overlap")
        if self.parts and self.parts[-1].end > declared.size:
            last = self.parts[-1]
            raise AuthorError(f"{last.name} ends at {last.end:#x}, behind BAR {self.index} of {declared.size:#x} bytes")
        for part in self.parts:
            if self._widths and part.widths and not self._widths & part.widths:
                its, all_have = (" or ".join(map(str, sorted(each))) for each in (part.widths, self._widths))
                raise AuthorError(
                    f"{part.name}: its accesses have {its} bytes, those of BAR {self.index} {all_have}: none reaches it"
                )
        registers = {
            part.offset: part
            for part in self.parts
            if isinstance(part, Register)
            and (not part.widths or part.size in part.widths)
            and (not self._widths or (part.size in self._widths and part.offset % part.size == 0))
        }
        self._whole = registers
        self._plain = {at: register if register.reads_plainly else _NOT_PLAIN for at, register in registers.items()}
        self._all_plain = self._plain
        self._on_read: Callable[[], None] | None = None

    def tell_next_read(self, on_read: Callable[[], None]) -> None:
        """Call ``on_read`` when a driver reads here the next time. It costs nothing after that."""
        self._on_read = on_read
        self._plain = {}  # what is looked up first: so all go the longer way

    def _tell(self) -> None:
        on_read, self._on_read, self._plain = self._on_read, None, self._all_plain
        if on_read is not None:
            on_read()

    # The two that are called for each access of a driver: one look-up for nearly all of them.

    def read(self, offset: int, count: int) -> bytes:
        """What a driver reads."""
        self.accesses += 1
        try:
            register = self._plain[offset]  # 12 ns less than get(), 3 % of a read
        except KeyError:
            return self._read(offset, count)
        if register.size == count:
            register.reads += 1
            return register.bits.to_bytes(count, "little")
        return self._read(offset, count)

    def write(self, offset: int, data: Buffer) -> None:
        """What a driver writes."""
        self.accesses += 1
        register = self._whole.get(offset)
        if register is None or register.size != len(data):
            self._write(offset, bytes(data))
            return
        self.last_write = register
        try:
            register.driver_write(NUMBERS[register.size].unpack(data)[0], register.all_bits)
        except Exception as error:
            self._blame(f"a write of {register.name}", error)

    def _read(self, offset: int, count: int) -> bytes:
        if self._on_read is not None:
            self._tell()
        register = self._whole.get(offset)
        if register is not None and register.size == count:
            try:
                return register.driver_read().to_bytes(count, "little")
            except Exception as error:
                self._blame(f"a read of {register.name}", error)
                return b"\xff" * count
        self._check_parts("read", offset, count)
        if self._refused("read", offset, count):
            return b"\xff" * count
        answer = bytearray()  # a client may read all of a big BAR at once: no copy for each register
        late: list[AnswerLater | Buffer] = []
        for part, start, length in self._pieces(offset, count):
            try:
                answer += self._not_there(start, length) if part is None else part.read_part(start, length)
            except AnswerLater as piece:
                late += answer, piece
                answer = bytearray()
            except Exception as error:
                self._blame(f"a read of {self._name(part)}", error)
                answer += b"\xff" * length
        if late:
            raise AnswerLater.joined([*late, answer])
        return bytes(answer)

    def _write(self, offset: int, data: bytes) -> None:
        self._check_parts("write", offset, len(data))
        if self._refused("write", offset, len(data)):
            return
        at, late = 0, list[AnswerLater | Buffer]()
        for part, start, length in self._pieces(offset, len(data)):
            piece = data[at : at + length]
            at += length
            try:
                if part is None:
                    self._unmodelled.write(self.index, start, piece)
                else:
                    self.last_write = part
                    part.write_part(start, piece)
            except AnswerLater as taken:
                late.append(taken)
            except Exception as error:
                self._blame(f"a write of {self._name(part)}", error)
        if late:
            raise AnswerLater.joined(late)

    def _check_parts(self, did: str, offset: int, count: int) -> None:
        """PeerError for an access that touches too many parts; each has a byte at least."""
        if count > MAX_PARTS:
            parts = bisect_left(self._starts, offset + count) - bisect_left(self._starts, offset)
            if parts > MAX_PARTS:
                where = f"{count:#x} bytes at BAR{self.index}+{offset:#x}"
                raise PeerError(f"{did} of {where}: {parts} registers are there, and {MAX_PARTS} at once are the most")

    def _not_there(self, start: int, length: int) -> bytes:
        answer = self._unmodelled.read(self.index, start, length)
        if len(answer) != length:
            raise AuthorError(
                f"unmodelled_read() returned {len(answer)} bytes for {length} at BAR{self.index}+{start:#x}"
            )
        return answer

    def _name(self, part: BarPart | None) -> str:
        return f"what is not modelled in BAR{self.index}" if part is None else part.name

    def _refused(self, did: str, offset: int, count: int) -> bool:
        """Whether a width or alignment is not allowed; it is logged then."""
        if self._widths and (count not in self._widths or offset % count):
            wanted, where = self._widths, f"BAR{self.index}"
        elif not self._have_widths:
            return False
        else:
            for part, _, _ in self._pieces(offset, count):
                if (
                    part is not None
                    and part.widths
                    and (count not in part.widths or (offset - part.offset) % min(count, part.size))
                ):
                    wanted, where = part.widths, part.name
                    break
            else:
                return False
        allowed = " or ".join(str(each) for each in sorted(wanted))
        answer = "it reads as all-ones" if did == "read" else "it is lost"
        self._log.once(
            ("width", self.index, did, where),
            "the driver %ss %d bytes at BAR%d+%#x, but accesses of %s have %s, aligned: %s",
            did,
            count,
            self.index,
            offset,
            where,
            allowed,
            answer,
        )
        return True

    def _pieces(self, offset: int, count: int) -> Iterator[tuple[BarPart | None, int, int]]:
        """What the bytes lie in, in order: a part and where in it, or None and the offset in the BAR; and how many."""
        at, end = offset, offset + count
        number = bisect_right(self._starts, at) - 1
        while at < end:
            part = self.parts[number] if number >= 0 else None
            if part is not None and at < part.end:
                length = min(end, part.end) - at
                yield part, at - part.offset, length
            else:
                following = self._starts[number + 1] if number + 1 < len(self.parts) else end
                length = min(end, following) - at
                yield None, at, length
            at += length
            if number + 1 < len(self.parts) and self._starts[number + 1] <= at:
                number += 1

    def _blame(self, what: str, error: Exception) -> None:
        if isinstance(error, PeerError):
            raise error
        self._failed(what, error)
