"""Rings of a device read plainly (virtio 1.4, 2.7 and 2.8): what a look at them must give, and what may be stored.

Slow words for what `vfiouser_virtio.vring` does fast: one descriptor after the other, one byte string at a time, in the
expected bytes of `memory.FlatMemory`. The model does in step what the ring does, and both must agree.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_virtio.testing.fuzz.parsers.memory import BASE, END, FlatMemory, look_up

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
_MAX_CHAIN = 1024  # what this package takes at most: `vring.descriptors.MAX_CHAIN`
_MAX_BYTES = 1 << 32  # 2.7.5.2
_SPLIT, _PACKED = struct.Struct("<QIHH"), struct.Struct("<QIHH")
_U16, _USED_ELEMENT = struct.Struct("<H"), struct.Struct("<II")


class RingSetUp(NamedTuple):
    """Ring as its driver has set it up, and where it goes on."""

    packed: bool
    size: int
    indirect: bool
    event_idx: bool
    in_order: bool
    desc: int
    """Offset of the descriptors in the flat picture, whose first region has them; likewise the others."""
    driver: int
    device: int
    available: int = 0
    """Positions, as `vring.RingState` has them."""
    used: int = 0


class Buffer(NamedTuple):
    """Buffer that the driver has made available."""

    key: int
    """The head's index (split) or the buffer id (packed)."""
    ranges: list[tuple[int, int]]
    """Address and length of each element."""
    writable_from: int
    """The index of the first writable one."""
    slots: int = 1
    """Descriptors of a packed ring that it takes."""
    table: int = 0
    """Entries of its indirect table, of which there may be more than elements."""


class Look(NamedTuple):
    """Result of a look at the ring: buffers, and what is wrong behind them: ``broken``, ``messages``, or nothing."""

    buffers: list[Buffer]
    problem: str


class BrokenRing(Exception):
    """The driver did what it must not do."""


class OnlyMessages(Exception):
    """Memory without a file descriptor is in the way."""


class RingModel(ABC):
    """State of a ring's device side between two steps."""

    def __init__(self, memory: FlatMemory, ring: RingSetUp) -> None:
        self.bytes = memory.expected
        self.ring = ring
        self.size = ring.size
        self.in_flight: dict[int, int] = {}
        """Slots of each buffer that was taken, and that the driver has not been shown as used."""
        self._taken: list[int] = []
        """With IN_ORDER: the same, in their order."""
        self.done: list[tuple[int, int]] = []
        """Key and bytes written of those that were completed and not shown, in the order of their completion."""
        self.signalled = 0
        """Where the driver was last asked for its wish."""

    # ---- taking --------------------------------------------------------------------------------------------------

    @abstractmethod
    def look(self, limit: int) -> Look:
        """Up to ``limit`` buffers that are available; nothing is taken."""

    def take(self, buffers: Sequence[Buffer]) -> None:
        """These were taken, from the next one on."""
        for buffer in buffers:
            self.in_flight[buffer.key] = buffer.slots
            if self.ring.in_order:
                self._taken.append(buffer.key)
            self._advance(buffer.slots)

    def give_back(self, buffer: Buffer) -> None:
        """The one that was taken last was not taken after all."""
        del self.in_flight[buffer.key]
        self._advance(-buffer.slots)

    @abstractmethod
    def _advance(self, slots: int) -> None: ...

    @property
    @abstractmethod
    def has_available(self) -> bool:
        """Whether the driver says that there is more."""

    def _checked(self, descriptors: list[tuple[int, int, bool]]) -> tuple[list[tuple[int, int]], int]:
        """Ranges, and the first that is writable, of (address, length, writable) (2.7.4.2, 2.7.5.2)."""
        ranges = []
        readable = total = 0
        for number, (address, length, writable) in enumerate(descriptors):
            if not writable:
                if readable < number:
                    raise BrokenRing("a readable element behind a writable one")
                readable += 1
            total += length
            ranges.append((address, length))
        if total > _MAX_BYTES:
            raise BrokenRing("more than 2^32 bytes")
        for address, length, writable in descriptors:
            if length and not (address >= BASE and address + length <= END):
                self._find(address, length, write=writable)
        return ranges, readable

    def _find(self, address: int, length: int, *, write: bool = False) -> list[tuple[int, int]]:
        found = look_up(address, length, write=write)
        if found == "messages":
            raise OnlyMessages
        if isinstance(found, str):
            raise BrokenRing(f"{address:#x}+{length:#x} is no memory")
        return found

    def _table(self, address: int, length: int) -> list[tuple[int, int, int, int]]:
        """The entries of an indirect table (2.7.5.3)."""
        if length % 16 or not 0 < length // 16 <= _MAX_CHAIN:
            raise BrokenRing(f"a table of {length:#x} bytes")
        whole = b"".join(self.bytes[begin:end] for begin, end in self._find(address, length))
        return list(_SPLIT.iter_unpack(whole))

    # ---- using ---------------------------------------------------------------------------------------------------

    def complete(self, key: int, written: int) -> None:
        """The device is done with a buffer."""
        self.done.append((key, written))

    def ready(self) -> list[tuple[int, int]]:
        """Those that may be shown now, in order (2.7.9)."""
        if not self.ring.in_order:
            return list(self.done)
        done = dict(self.done)
        ready = []
        for key in self._taken:
            if key not in done:
                break
            ready.append((key, done[key]))
        return ready

    def show(self, count: int | None = None) -> int:
        """Store used buffers, up to ``count`` of those that are ready: how many."""
        ready = self.ready()[:count]
        self._store(ready)
        shown = {key for key, _ in ready}
        self.done = [pair for pair in self.done if pair[0] not in shown]
        self._taken = [key for key in self._taken if key not in shown]
        for key in shown:
            del self.in_flight[key]
        return len(ready)

    @abstractmethod
    def _store(self, ready: list[tuple[int, int]]) -> None: ...

    @abstractmethod
    def interrupt_due(self) -> bool | None:
        """Whether the driver wants to hear of what was shown since the last call; None: nothing says so."""

    @abstractmethod
    def ask(self) -> bool:
        """Ask for a notification: whether there is something available already."""

    @abstractmethod
    def suppress(self) -> None:
        """Ask for none."""

    def word(self, at: int) -> int:
        """16 bits there."""
        return self.bytes[at] | self.bytes[at + 1] << 8

    def put_word(self, at: int, value: int) -> None:
        """Store them."""
        _U16.pack_into(self.bytes, at, value & 0xFFFF)


class SplitModel(RingModel):
    """Split ring (2.7)."""

    def __init__(self, memory: FlatMemory, ring: RingSetUp) -> None:
        super().__init__(memory, ring)
        self.next_avail, self.next_used = ring.available, ring.used
        self.signalled = ring.used

    @property
    def has_available(self) -> bool:
        return self.word(self.ring.driver + 2) != self.next_avail

    def look(self, limit: int) -> Look:
        size, driver = self.size, self.ring.driver
        available = (self.word(driver + 2) - self.next_avail) % 0x10000
        buffers: list[Buffer] = []
        if available > size:
            return Look(buffers, "broken")
        taken = set(self.in_flight)
        try:
            for number in range(min(available, limit)):
                head = self.word(driver + 4 + 2 * ((self.next_avail + number) % size))
                if head >= size or head in taken:
                    raise BrokenRing("a head that is none, or in flight")
                found, table = self._chain(head)
                buffers.append(Buffer(head, *self._checked(found), table=table))
                taken.add(head)
        except BrokenRing:
            return Look(buffers, "broken")
        except OnlyMessages:
            return Look(buffers, "messages")
        return Look(buffers, "")

    def _chain(self, head: int) -> tuple[list[tuple[int, int, bool]], int]:
        """Its elements, and how many entries its table has."""
        found: list[tuple[int, int, bool]] = []
        index, table, count = head, self.ring.desc, self.size
        entries = None
        steps = 0
        while True:
            address, length, flags, following = (
                _SPLIT.unpack_from(self.bytes, table + 16 * index) if entries is None else entries[index]
            )
            if flags & INDIRECT:
                if entries is not None or flags & NEXT or not self.ring.indirect:
                    raise BrokenRing("an indirect descriptor where none may be")
                entries = self._table(address, length)
                index, count, steps = 0, len(entries), 0
                continue
            steps += 1
            found.append((address, length, bool(flags & WRITE)))
            if not flags & NEXT:
                break
            if following >= count or steps >= min(count, _MAX_CHAIN):
                raise BrokenRing("a link out of the table, or a loop")
            index = following
        if len(found) > _MAX_CHAIN:
            raise BrokenRing("too long")
        return found, 0 if entries is None else len(entries)

    def _advance(self, slots: int) -> None:
        self.next_avail = (self.next_avail + slots) % 0x10000

    def _store(self, ready: list[tuple[int, int]]) -> None:
        device = self.ring.device
        for key, written in ready:
            _USED_ELEMENT.pack_into(self.bytes, device + 4 + 8 * (self.next_used % self.size), key, written)
            self.next_used = (self.next_used + 1) % 0x10000
        if ready:
            self.put_word(device + 2, self.next_used)

    def interrupt_due(self) -> bool:
        if not self.ring.event_idx:
            return not self.word(self.ring.driver) & 1
        event, old = self.word(self.ring.driver + 4 + 2 * self.size), self.signalled
        self.signalled = self.next_used
        return (event - old) % 0x10000 < (self.next_used - old) % 0x10000

    def ask(self) -> bool:
        if self.ring.event_idx:
            self.put_word(self.ring.device + 4 + 8 * self.size, self.next_avail)
        else:
            self.put_word(self.ring.device, 0)
        return self.has_available

    def suppress(self) -> None:
        if not self.ring.event_idx:
            self.put_word(self.ring.device, 1)


class PackedModel(RingModel):
    """Packed ring (2.8); a place is a descriptor's index and the wrap counter there."""

    def __init__(self, memory: FlatMemory, ring: RingSetUp) -> None:
        super().__init__(memory, ring)
        self.next_avail, self.next_used = self._place(ring.available), self._place(ring.used)
        self.signalled = ring.used

    def _place(self, position: int) -> tuple[int, bool]:
        return position % self.size, position < self.size

    def _beyond(self, place: tuple[int, bool], count: int) -> tuple[int, bool]:
        slot, wrap = place
        slot += count
        return (slot, wrap) if 0 <= slot < self.size else (slot % self.size, not wrap)

    def _is_available(self, place: tuple[int, bool]) -> bool:
        slot, wrap = place
        return self.word(self.ring.desc + 16 * slot + 14) & (AVAIL | USED) == (AVAIL if wrap else USED)

    @property
    def has_available(self) -> bool:
        return self._is_available(self.next_avail)

    def look(self, limit: int) -> Look:
        buffers: list[Buffer] = []
        place, taken = self.next_avail, set(self.in_flight)
        free = self.size - sum(self.in_flight.values())
        try:
            for _ in range(limit):
                if not self._is_available(place):
                    break
                buffer = self._buffer(place, free, taken)
                buffers.append(buffer)
                taken.add(buffer.key)
                free -= buffer.slots
                place = self._beyond(place, buffer.slots)
        except BrokenRing:
            return Look(buffers, "broken")
        except OnlyMessages:
            return Look(buffers, "messages")
        return Look(buffers, "")

    def _buffer(self, place: tuple[int, bool], free: int, taken: set[int]) -> Buffer:
        found: list[tuple[int, int, bool]] = []
        indirect: list[tuple[int, int]] = []
        while True:
            if len(found) >= min(free, _MAX_CHAIN) or not self._is_available(place):
                raise BrokenRing("a list that goes on where nothing is available")
            address, length, key, flags = _PACKED.unpack_from(self.bytes, self.ring.desc + 16 * place[0])
            found.append((address, length, bool(flags & WRITE)))
            if flags & INDIRECT:
                indirect.append((address, length))
            if not flags & NEXT:
                break
            place = self._beyond(place, 1)
        slots = len(found)
        if key in taken:
            raise BrokenRing("an id in flight")
        if indirect:
            if slots > 1 or not self.ring.indirect:
                raise BrokenRing("an indirect descriptor where none may be")
            found = [(entry[0], entry[1], bool(entry[3] & WRITE)) for entry in self._table(*indirect[0])]
        return Buffer(key, *self._checked(found), slots, len(found) if indirect else 0)

    def _advance(self, slots: int) -> None:
        self.next_avail = self._beyond(self.next_avail, slots)

    def _store(self, ready: list[tuple[int, int]]) -> None:
        for key, written in ready:
            slot, wrap = self.next_used
            flags = (AVAIL | USED if wrap else 0) | (WRITE if written else 0)
            struct.pack_into("<IHH", self.bytes, self.ring.desc + 16 * slot + 8, written, key, flags)
            self.next_used = self._beyond(self.next_used, self.in_flight[key])

    def interrupt_due(self) -> bool | None:
        event, flags = self.word(self.ring.driver), self.word(self.ring.driver + 2) & 3
        size, old = self.size, self.signalled
        slot, wrap = self.next_used
        new = self.signalled = slot if wrap else slot + size
        if flags == 1:
            return False
        if flags != 2 or not self.ring.event_idx:
            return True
        wanted = (event & 0x7FFF) + (0 if event & 0x8000 else size)
        if event & 0x7FFF >= size:
            return None  # there is no such descriptor
        return (wanted - old) % (2 * size) < (new - old) % (2 * size)

    def ask(self) -> bool:
        slot, wrap = self.next_avail
        self.put_word(self.ring.device, slot | wrap << 15 if self.ring.event_idx else 0)
        self.put_word(self.ring.device + 2, 2 if self.ring.event_idx else 0)
        return self.has_available

    def suppress(self) -> None:
        self.put_word(self.ring.device, 0)
        self.put_word(self.ring.device + 2, 1)


def address_of(flat: int) -> int:
    """The DMA address of an offset in the first region."""
    return BASE + flat
