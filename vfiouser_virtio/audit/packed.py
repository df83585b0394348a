"""Watch of a packed ring: lists of descriptors, indirect tables, event suppression (virtio 1.4, 2.8).

Written apart from `vring`, which refuses what it must and passes over the rest: here each rule is looked at by itself.
"""

from vfiouser_virtio.audit.chains import ChainWatch, SeenChain, look
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule, must
from vfiouser_virtio.protocols.virtio.ring import PACKED_DESC_CODEC, DescFlags, RingEventFlags
from vfiouser_virtio.vring import RingFeatures
from vfiouser_virtio.vring.descriptors import Memory

_LIST = "2.8.17 Scatter-Gather Support"
_INDIRECT = "2.8.19 Indirect Descriptors"

CHANGED = must(
    "packed/changed",
    "2.8.16 The Virtqueue Descriptor Table",
    "A descriptor that is available is not changed until it is used.",
    "its bytes when it is taken, and when its buffer is used",
)
ORDER = must(
    "packed/order",
    _LIST,
    "Device-writable descriptors come after all device-readable ones.",
    "WRITE of each descriptor",
)
LONG = must(
    "packed/long",
    f"{_LIST}, 2.8.19",
    "A list has no more descriptors than the queue has entries.",
    "lists, and indirect tables, that are longer",
)
WHOLE = must(
    "packed/whole-list",
    _LIST,
    "The first descriptor of a list is made available after all the others.",
    "NEXT in a descriptor, and one behind it that is not available",
)
SPACE = must(
    "packed/space",
    _LIST,
    "A list is made available only where the ring has room for all of it.",
    "descriptors that are available while as many as the ring has are in flight",
)
ID = must(
    "packed/id",
    "2.8.6 Descriptor Chaining, 2.8.21.1 (prose)",
    "The id of a buffer that the device has is that of no other.",
    "the ids of buffers in flight",
)
NEGOTIATED = must(
    "packed/indirect-negotiated",
    _INDIRECT,
    "INDIRECT is set only where INDIRECT_DESC was negotiated.",
    "flags of each descriptor",
)
TABLE_FLAGS = must(
    "packed/indirect-flags",
    _INDIRECT,
    "Entries of an indirect table have no flag but WRITE.",
    "flags of each entry",
)
IN_LIST = must(
    "packed/indirect-in-list",
    _INDIRECT,
    "A descriptor with INDIRECT is in no list linked by NEXT.",
    "flags of the descriptors of each list",
)
TABLE_SIZE = must(
    "packed/indirect-size",
    "2.8.7 Indirect Flag: Scatter-Gather Support (prose)",
    "An indirect table is 16 bytes for each of its entries, one at least.",
    "length of each descriptor with INDIRECT",
)
EVENT_FLAGS = must(
    "packed/event-flags",
    "2.8.10 Driver and Device Event Suppression (prose)",
    "flags of the driver's event suppression are 0 or 1, with EVENT_IDX 2 as well.",
    "these flags at each look",
)

_NEXT, _WRITE, _INDIRECT_FLAG = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
_MARKS = int(DescFlags.AVAIL | DescFlags.USED)
_DESC = PACKED_DESC_CODEC.size
_MAX_TABLE = 1 << 16
"""Entries of an indirect table that are looked at: the one of a hostile driver has up to 2^28."""

Found = list[tuple[int, int, int]]
"""Address, length and flags of each descriptor."""


class PackedWatch:
    """Watch of one ring between its enabling and its reset."""

    def __init__(
        self, queue: int, size: int, features: RingFeatures, findings: Findings, chains: ChainWatch | None
    ) -> None:
        self._queue = queue
        self._size = size
        self._features = features
        self._findings = findings
        self._chains = chains
        self._in_flight: dict[int, dict[int, bytes]] = {}
        """Id to the descriptors of its list, by slot, but for those that the driver may have again."""
        self._owner: dict[int, int] = {}
        """Slot to that id. To look at each list for each buffer that is used takes a minute for 2^15 of them."""

    def _broke(self, rule: Rule, seen: str) -> None:
        self._findings.broke(rule, f"queue {self._queue}: {seen}")

    # ---- what the device does ------------------------------------------------------------------------------------

    def looks(self, parts: list[memoryview]) -> None:
        """The device looks at the ring."""
        flags = parts[1].cast("H")[1]
        if flags > (RingEventFlags.DESC if self._features.event_idx else RingEventFlags.DISABLE):
            self._broke(EVENT_FLAGS, f"flags of the driver's event suppression are {flags:#x}")

    def waiting(self, parts: list[memoryview], position: int) -> int:
        """Buffers that are available from ``position`` on (see `vring.packed`)."""
        count = 0
        for _ in range(self._size):
            slot, available = self._place(position)
            flags = PACKED_DESC_CODEC.unpack_from(parts[0], _DESC * slot)[3]
            if flags & _MARKS != available:
                break
            count += not flags & _NEXT
            position = (position + 1) % (2 * self._size)
        return count

    def end(self, parts: list[memoryview], position: int) -> int:
        """Where the descriptors end that are available from ``position`` on (see `vring.packed`)."""
        for _ in range(self._size):
            slot, available = self._place(position)
            if PACKED_DESC_CODEC.unpack_from(parts[0], _DESC * slot)[3] & _MARKS != available:
                break
            position = (position + 1) % (2 * self._size)
        return position

    def takes(self, parts: list[memoryview], slot: int, count: int, memory: Memory) -> None:
        """The device has taken the list of ``count`` descriptors at ``slot``."""
        slots = [(slot + number) % self._size for number in range(count)]
        descriptors = [PACKED_DESC_CODEC.unpack_from(parts[0], _DESC * each) for each in slots]
        head = descriptors[-1][2]
        found = self._resolve(head, [(address, length, flags) for address, length, _, flags in descriptors], memory)
        self._in_flight[head] = {each: self._raw(parts, each) for each in slots}
        self._owner.update((each, head) for each in slots)
        writes = [bool(flags & _WRITE) for _, _, flags in found]
        if writes != sorted(writes):
            self._broke(ORDER, f"buffer {head:#x} has a readable descriptor behind a writable one")
        if self._chains is not None:
            readable = [(address, length) for address, length, flags in found if not flags & _WRITE]
            writable = [(address, length) for address, length, flags in found if flags & _WRITE]
            chain = SeenChain(self._queue, head, readable, writable, memory)
            self._findings.tell(self._chains.available, chain)

    def refuses(self, parts: list[memoryview], position: int, room: int, memory: Memory) -> None:
        """The device takes no more: of what is at ``position`` (see `vring.packed`) something is wrong."""
        slot, available = self._place(position)
        found: Found = []
        for number in range(self._size + 1):
            if number == room:
                rule, seen = SPACE, f"descriptor {slot:#x} is available, and all {self._size:#x} are in flight"
                if room == self._size:
                    rule, seen = LONG, f"the list before descriptor {slot:#x} has more than {self._size:#x}"
                self._broke(rule, seen)
                return
            address, length, head, flags = PACKED_DESC_CODEC.unpack_from(parts[0], _DESC * slot)
            if flags & _MARKS != available:
                if found:
                    self._broke(WHOLE, f"descriptor {slot:#x} is not available, and the list goes on there")
                return
            found.append((address, length, flags))
            if not flags & _NEXT:
                break
            slot += 1
            if slot == self._size:
                slot, available = 0, DescFlags(int(available) ^ _MARKS)
        else:
            return
        if head in self._in_flight:
            self._broke(ID, f"buffer {head:#x} was made available while it is in flight")
            return
        found = self._resolve(head, found, memory)
        writes = [bool(flags & _WRITE) for _, _, flags in found]
        if writes != sorted(writes):
            self._broke(ORDER, f"buffer {head:#x} has a readable descriptor behind a writable one")

    def uses(self, parts: list[memoryview], used: list[tuple[int, int, int]]) -> None:
        """The device is about to write these used descriptors: buffer id, slot, and slots that the buffer had."""
        for head, slot, count in used:
            for place, raw in self._in_flight.pop(head, {}).items():
                del self._owner[place]
                if self._raw(parts, place) != raw:
                    self._broke(
                        CHANGED, f"descriptor {place:#x} of buffer {head:#x} was changed while it was available"
                    )
            # All these are the driver's, whatever buffer was there: it may write the next ones at once.
            for number in range(count):
                place = (slot + number) % self._size
                other = self._owner.pop(place, None)
                if other is not None:
                    del self._in_flight[other][place]
            if self._chains is not None:
                self._findings.tell(self._chains.used, self._queue, head)

    def _place(self, position: int) -> tuple[int, DescFlags]:
        """Slot, and the mark of an available descriptor there."""
        if position < self._size:
            return position, DescFlags.AVAIL
        return position - self._size, DescFlags.USED

    # ---- a list --------------------------------------------------------------------------------------------------

    def _resolve(self, head: int, found: Found, memory: Memory) -> Found:
        """The buffers of a list, those of an indirect table instead of its descriptor."""
        indirect = [each for each in found if each[2] & _INDIRECT_FLAG]
        if not indirect:
            return found
        if not self._features.indirect:
            self._broke(NEGOTIATED, f"buffer {head:#x} has INDIRECT, which was not negotiated")
            return []
        if len(found) > 1:
            self._broke(IN_LIST, f"buffer {head:#x} has INDIRECT in a list of {len(found):#x}")
            return []
        [(address, length, _)] = indirect
        count, rest = divmod(length, _DESC)
        if rest or not count:
            self._broke(TABLE_SIZE, f"buffer {head:#x}: an indirect table of {length:#x} bytes")
            return []
        if count > self._size:
            self._broke(
                LONG, f"buffer {head:#x}: an indirect table of {count:#x} entries, the queue has {self._size:#x}"
            )
        raw = look(memory, address, _DESC * min(count, _MAX_TABLE))
        entries = [] if raw is None else list(PACKED_DESC_CODEC.iter_unpack(raw))
        wrong = next((flags for _, _, _, flags in entries if flags & ~_WRITE), None)
        if wrong is not None:
            self._broke(TABLE_FLAGS, f"buffer {head:#x}: an entry of its indirect table has flags {wrong:#x}")
        return [(address, length, flags) for address, length, _, flags in entries]

    @staticmethod
    def _raw(parts: list[memoryview], slot: int) -> bytes:
        return bytes(parts[0][_DESC * slot : _DESC * (slot + 1)])
