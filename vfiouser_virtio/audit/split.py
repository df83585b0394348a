"""Watch of a split ring: available ring, descriptors, indirect tables, as a driver has written them (virtio 1.4, 2.7).

Written apart from `vring`, which refuses what it must and passes over the rest: here each rule is looked at by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vfiouser_virtio.audit.chains import ChainWatch, SeenChain, look
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule, must
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.vring import RingFeatures
from vfiouser_virtio.vring.descriptors import Memory

_TABLE = "2.7.5.2 The Virtqueue Descriptor Table"
_INDIRECT = "2.7.5.3.1 Indirect Descriptors"
_AVAIL = "2.7.6.1 The Virtqueue Available Ring"

DECREMENT = must(
    "split/decrement", _AVAIL, "idx of the available ring never goes back.", "idx at each look, and the highest before"
)
OVERRUN = must(
    "split/overrun",
    "2.7.6 The Virtqueue Available Ring (prose)",
    "No more buffers are available than the ring has entries.",
    "idx at each look, and how many entries the device has taken",
)
HEAD_RANGE = must(
    "split/head-range",
    "2.7.6 The Virtqueue Available Ring (prose)",
    "An entry of the available ring is a descriptor of the table.",
    "each entry that the device takes",
)
IN_FLIGHT = must(
    "split/in-flight",
    "3.3.1 Device Cleanup, 2.7.13.1 (prose)",
    "A descriptor of a buffer that the device has is in no other chain.",
    "the descriptors of each chain, and those of all that are in flight",
)
CHANGED = must(
    "split/changed",
    "3.3.1 Device Cleanup",
    "Descriptors of a buffer that the device has are not altered.",
    "its descriptors and indirect table when it is taken, and when it is used",
)
NEXT_RANGE = must(
    "split/next-range",
    "2.7.5 The Virtqueue Descriptor Table (prose)",
    "next is a descriptor of the table that the chain is in.",
    "next of each descriptor with NEXT",
)
LOOP = must("split/loop", _TABLE, "A chain has no loop.", "more descriptors linked than the table has")
BYTES = must("split/bytes", _TABLE, "A chain is no longer than 2^32 bytes.", "the lengths of its descriptors")
LONG = must(
    "split/long",
    _INDIRECT,
    "A chain has no more descriptors than the queue has entries.",
    "descriptors of each chain, those of an indirect table counted",
)
ORDER = must(
    "split/order",
    "2.7.4.2 Message Framing",
    "Device-writable descriptors come after all device-readable ones.",
    "WRITE of each descriptor",
)
NEGOTIATED = must(
    "split/indirect-negotiated",
    _INDIRECT,
    "INDIRECT is set only where INDIRECT_DESC was negotiated.",
    "flags of each descriptor",
)
WITH_NEXT = must(
    "split/indirect-next", _INDIRECT, "INDIRECT and NEXT are not set both.", "flags of each descriptor with INDIRECT"
)
NESTED = must(
    "split/indirect-nested", _INDIRECT, "INDIRECT is not set within an indirect table.", "flags of each of its entries"
)
TABLE_SIZE = must(
    "split/indirect-size",
    "2.7.5.3 Indirect Descriptors (prose)",
    "An indirect table is 16 bytes for each of its entries, one at least.",
    "length of each descriptor with INDIRECT",
)
IN_ORDER_NEXT = must(
    "split/in-order-next",
    _TABLE,
    "With IN_ORDER, next of descriptor x is x + 1, and 0 in the last one.",
    "next of each descriptor with NEXT",
)
IN_ORDER_TABLE = must(
    "split/in-order-indirect",
    _INDIRECT,
    "With IN_ORDER, the entries of an indirect table are linked one after the other.",
    "next of each entry with NEXT",
)
FLAGS = must(
    "split/flags",
    "2.7.5 The Virtqueue Descriptor Table (prose)",
    "flags of a descriptor have no bits but NEXT, WRITE and INDIRECT.",
    "flags of each descriptor",
)
AVAIL_FLAGS = must(
    "split/avail-flags",
    "2.7.7.1 Used Buffer Notification Suppression",
    "flags of the available ring are 0 or 1; with EVENT_IDX 0.",
    "flags at each look",
)
USED_WRITTEN = must(
    "split/used-written",
    "2.7.8 The Virtqueue Used Ring (prose)",
    "The used ring is written by the device alone.",
    "idx of the used ring, before the device stores the next one, and what the device has stored last",
)

_NEXT, _WRITE, _INDIRECT_FLAG = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
_KNOWN = _NEXT | _WRITE | _INDIRECT_FLAG
_DESC = DESC_CODEC.size
_MAX_TABLE = 1 << 16
"""Entries of an indirect table that are looked at: none behind these can be linked, next has 16 bits. The table of a
hostile driver has up to 2^28, all linked in a loop."""


@dataclass(slots=True)
class _InFlight:
    """Buffer in flight, which the driver must not touch."""

    places: tuple[int, ...]
    """Indices of its descriptors."""
    raw: bytes
    """These descriptors."""
    table: tuple[int, bytes] | None
    """Address and bytes of its indirect table."""


class SplitWatch:
    """Watch of one ring between its enabling and its reset."""

    def __init__(
        self, queue: int, size: int, features: RingFeatures, findings: Findings, chains: ChainWatch | None
    ) -> None:
        self._queue = queue
        self._size = size
        self._features = features
        self._findings = findings
        self._chains = chains
        self._highest: int | None = None
        self._in_flight: dict[int, _InFlight] = {}
        self._busy: dict[int, int] = {}
        """Descriptor to the head of the chain in flight that it is in."""

    def _broke(self, rule: Rule, seen: str) -> None:
        self._findings.broke(rule, f"queue {self._queue}: {seen}")

    # ---- what the device does ------------------------------------------------------------------------------------

    def looks(self, parts: list[memoryview], taken: int) -> None:
        """The device looks at the available ring, of which it has ``taken`` so many entries (modulo 2^16)."""
        avail = parts[1].cast("H")
        flags, idx = avail[0], avail[1]
        if flags and (self._features.event_idx or flags != 1):
            with_event = "with" if self._features.event_idx else "without"
            self._broke(AVAIL_FLAGS, f"flags of the available ring are {flags:#x}, {with_event} EVENT_IDX")
        highest = taken if self._highest is None else self._highest
        if (idx - highest) & 0xFFFF >= 1 << 15:
            self._broke(DECREMENT, f"idx of the available ring was {highest:#x}, and is {idx:#x}")
        elif (idx - taken) & 0xFFFF > self._size:
            self._broke(OVERRUN, f"idx of the available ring is {idx:#x}; {taken:#x} are taken, it has {self._size:#x}")
        self._highest = idx

    def takes(self, parts: list[memoryview], first: int, last: int, memory: Memory, *, refused: bool = False) -> None:
        """The device has taken the entries from ``first`` on, and before ``last``, modulo 2^16, or refused that."""
        avail = parts[1].cast("H")
        # The entry that is refused is looked at, too; when there are more than can be, nothing is.
        if refused and (avail[1] - last) & 0xFFFF <= self._size:
            last += 1
        for number in range((last - first) & 0xFFFF):
            self._take(parts, avail[2 + (first + number) % self._size], memory)

    def uses(self, parts: list[memoryview], heads: list[int], memory: Memory) -> None:
        """The device is about to show these as used."""
        for head in heads:
            entry = self._in_flight.pop(head, None)
            if entry is None:
                continue
            for place in entry.places:
                self._busy.pop(place, None)
            changed = self._raw(parts, entry.places) != entry.raw
            if not changed and entry.table is not None:
                address, raw = entry.table
                now = look(memory, address, len(raw))
                changed = now is not None and now != raw
            if changed:
                self._broke(CHANGED, f"chain {head:#x} was altered while the device had it")
            if self._chains is not None:
                self._findings.tell(self._chains.used, self._queue, head)

    def stores(self, parts: list[memoryview], index: int) -> None:
        """The device is about to store used elements, and has stored ``index`` before."""
        found = parts[2].cast("H")[1]
        if found != index:
            self._broke(USED_WRITTEN, f"idx of the used ring is {found:#x}, the device has stored {index:#x}")

    # ---- a chain -------------------------------------------------------------------------------------------------

    def _take(self, parts: list[memoryview], head: int, memory: Memory) -> None:
        if head >= self._size:
            self._broke(HEAD_RANGE, f"the available ring names descriptor {head:#x} of {self._size:#x}")
            return
        places: list[int] = []
        found: list[tuple[int, int, int]] = []
        table = None
        for place, (address, length, flags) in self._walk(parts[0], head, self._size, f"chain {head:#x}"):
            places.append(place)
            if flags & _INDIRECT_FLAG:
                table = self._indirect(head, address, length, flags, found, memory)
                break
            found.append((address, length, flags))
        shared = next((place for place in places if place in self._busy), None)
        if shared is not None:
            self._broke(
                IN_FLIGHT, f"descriptor {shared:#x} of chain {head:#x} is in {self._busy[shared]:#x}, in flight"
            )
            return
        self._busy.update(dict.fromkeys(places, head))
        self._in_flight[head] = _InFlight(tuple(places), self._raw(parts, places), table)
        self._judge(head, found)
        if self._chains is not None:
            readable = [(address, length) for address, length, flags in found if not flags & _WRITE]
            writable = [(address, length) for address, length, flags in found if flags & _WRITE]
            chain = SeenChain(self._queue, head, readable, writable, memory)
            self._findings.tell(self._chains.available, chain)

    def _judge(self, head: int, found: list[tuple[int, int, int]]) -> None:
        """What holds for the chain as a whole."""
        total = sum(length for _, length, _ in found)
        if total > 1 << 32:
            self._broke(BYTES, f"chain {head:#x} has {total:#x} bytes")
        if len(found) > self._size:
            self._broke(LONG, f"chain {head:#x} has {len(found):#x} descriptors, the queue {self._size:#x} entries")
        writes = [bool(flags & _WRITE) for _, _, flags in found]
        if writes != sorted(writes):
            self._broke(ORDER, f"chain {head:#x} has a readable descriptor behind a writable one")

    def _walk(
        self, table: memoryview | bytes, index: int, count: int, where: str, *, indirect: bool = False
    ) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """The descriptors that are linked from ``index`` on, as (index, (address, length, flags)).

        Of those of a table that has more entries than the queue no more than it takes for the chain to be too long.
        """
        for _ in range(min(count, self._size + 1)):
            address, length, flags, following = DESC_CODEC.unpack_from(table, _DESC * index)
            if flags & ~_KNOWN:
                self._broke(FLAGS, f"{where}: flags of descriptor {index:#x} are {flags:#x}")
            if flags & _INDIRECT_FLAG and indirect:
                self._broke(NESTED, f"{where}: entry {index:#x} has INDIRECT")
                return
            yield index, (address, length, flags)
            if not flags & _NEXT:
                return
            if following >= count:
                self._broke(NEXT_RANGE, f"{where}: next of descriptor {index:#x} is {following:#x} of {count:#x}")
                return
            if self._features.in_order and following != (0 if index + 1 == count and not indirect else index + 1):
                rule = IN_ORDER_TABLE if indirect else IN_ORDER_NEXT
                self._broke(rule, f"{where}: next of descriptor {index:#x} is {following:#x}")
            index = following
        if count <= self._size:
            self._broke(LOOP, f"{where}: more descriptors are linked than the {count:#x} there are")

    def _indirect(
        self, head: int, address: int, length: int, flags: int, found: list[tuple[int, int, int]], memory: Memory
    ) -> tuple[int, bytes] | None:
        """Add the entries of an indirect table to ``found``; the table."""
        where = f"chain {head:#x}"
        if not self._features.indirect:
            self._broke(NEGOTIATED, f"{where} has INDIRECT, which was not negotiated")
            return None
        if flags & _NEXT:
            self._broke(WITH_NEXT, f"{where} has INDIRECT and NEXT")
        count, rest = divmod(length, _DESC)
        if rest or not count:
            self._broke(TABLE_SIZE, f"{where}: an indirect table of {length:#x} bytes")
            return None
        raw = look(memory, address, _DESC * min(count, _MAX_TABLE))
        if raw is None:
            return None
        found += [each for _, each in self._walk(raw, 0, count, f"{where}, indirect table", indirect=True)]
        return address, raw

    def _raw(self, parts: list[memoryview], places: "tuple[int, ...] | list[int]") -> bytes:
        return b"".join(bytes(parts[0][_DESC * place : _DESC * (place + 1)]) for place in places)
