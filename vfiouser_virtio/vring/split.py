"""The split virtqueue, device side (virtio 1.4, 2.7): synchronous and pure, every check before the first access.

::

    descriptor table   ◀── head ── available ring      driver writes, we read       avail.idx, used_event
     addr len flags next           used ring           we write, driver reads       used.idx, avail_event

`SplitRing.pop` copies each descriptor once, validates the copy and then uses it. `push` collects, `publish` stores the
used entries, then the index, then says whether an interrupt is due.
"""

from collections.abc import Callable

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.errors import GuestError, Unmapped
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.protocols.virtio.ring import (
    DESC_CODEC,
    USED_ELEM_CODEC,
    AvailFlags,
    DescFlags,
    UsedFlags,
)
from vfiouser_virtio.vring.chain import Chain, Memory, Readable, Writable

NEXT, WRITE, INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
# The specification limits a chain to the queue size (2.7.5.3.1), but Linux puts longer ones into indirect tables of
# small queues, and QEMU takes up to 1024. More than that is an attack on our memory and time.
MAX_INDIRECT = 1024
# "Descriptor chain longer than 2^32 bytes in total" is forbidden (2.7.5.2).
MAX_CHAIN_BYTES = 1 << 32

_unpack_desc = DESC_CODEC.unpack_from
_DESC_SIZE = DESC_CODEC.size
_USED_SIZE = USED_ELEM_CODEC.size
_pack_used = USED_ELEM_CODEC.pack_into
_NO_INTERRUPT = int(AvailFlags.NO_INTERRUPT)

Descriptor = tuple[int, int, int, int]  # addr, len, flags, next


class SplitRing:
    """One split queue between its set-up and its reset. `bind` comes first, and again whenever memory moved.

    ``size`` is a power of two up to 32768. ``indirect`` and ``event_idx`` are the negotiated features.
    Every method that looks at the guest's side raises GuestError for what the driver must not do.
    """

    def __init__(self, size: int, memory: Memory, *, indirect: bool = False, event_idx: bool = False) -> None:
        assert 0 < size <= 32768, size
        assert size & (size - 1) == 0, size
        self.size = size
        self.memory = memory
        self.indirect = indirect
        self.event_idx = event_idx
        self.last_avail = 0
        """``idx`` of the next entry of the available ring to take, modulo 2^16."""
        self.used_idx = 0
        """``idx`` of the used ring as published, modulo 2^16."""
        self.in_flight: dict[int, Chain] = {}
        """Chains that were taken and are not yet pushed, by head."""
        self.on_push: Callable[[], None] = _nothing
        """Called after every `push`, so that whoever owns the ring can decide when to publish."""
        self._pushed: list[tuple[Chain, int]] = []
        self._signalled_idx = 0
        self._signalled = False
        self._mask = size - 1
        self._dead = False
        self.desc_bytes = self.avail_bytes = self.used_bytes = memoryview(b"")
        """The three parts as they were bound: guest memory, or local copies that the owner keeps up to date."""
        self._avail = self._used_words = memoryview(b"")

    # ---- where the ring is ---------------------------------------------------------------------------------------

    def bind(self, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        """Use these views (or local copies) of the three parts; `protocols.virtio.ring` has their sizes."""
        self.desc_bytes, self.avail_bytes, self.used_bytes = desc, avail, used
        # Native-width typed views: one item is one aligned load or store (struct.pack_into is not).
        self._avail = avail.cast("H")
        self._used_words = used.cast("H")

    def kill(self) -> None:
        """The queue was reset: chains in flight can neither touch their buffers nor be published."""
        self._dead = True
        self.on_push = _nothing
        for chain in self.in_flight.values():
            chain.stale = True

    # ---- the available side --------------------------------------------------------------------------------------

    def pop(self, limit: int) -> list[Chain]:
        """Take up to ``limit`` chains in the order in which they were made available.

        Raises GuestError for a broken ring; NeedsMessages, with nothing taken, where memory must be fetched first.
        """
        available = (self._avail[1] - self.last_avail) & 0xFFFF
        if available > self.size:
            raise GuestError(
                f"avail.idx is {self._avail[1]:#x}, but only {self.size:#x} entries can follow {self.last_avail:#x}"
            )
        # The load of avail.idx comes before the loads of the entries: kept by x86; aarch64 needs telling.
        if available and not TSO:
            full_barrier()
        chains: list[Chain] = []
        for _ in range(min(available, limit)):
            head = self._avail[2 + (self.last_avail & self._mask)]
            try:
                chain = self._chain(head)
            except NeedsMessages:
                if not chains:
                    raise
                break
            self.in_flight[head] = chain
            self.last_avail = (self.last_avail + 1) & 0xFFFF
            chains.append(chain)
        return chains

    def has_available(self) -> bool:
        """Whether the driver has made more available."""
        return bool(self._avail[1] != self.last_avail)

    def suppress_notifications(self) -> None:
        """Tell the driver not to notify us: we look at the ring ourselves (2.7.10)."""
        if not self.event_idx:  # with EVENT_IDX an avail_event that stays behind says the same
            self._used_words[0] = int(UsedFlags.NO_NOTIFY)

    def request_notification(self) -> bool:
        """Ask for a notification of the next chain; True when one is there already, so that nobody must wait."""
        if self.event_idx:
            self._used_words[2 + 4 * self.size] = self.last_avail
        else:
            self._used_words[0] = 0
        # Orders our store of avail_event (or flags) before our load of avail.idx; the driver does the mirror image.
        full_barrier()
        return bool(self._avail[1] != self.last_avail)

    # ---- the used side -------------------------------------------------------------------------------------------

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back; it is shown to the driver with the next `publish`."""
        if self.in_flight.pop(chain.head, None) is chain:
            self._pushed.append((chain, written & 0xFFFF_FFFF))
            self.on_push()

    @property
    def unpublished(self) -> int:
        """How many pushed chains the driver has not been shown."""
        return len(self._pushed)

    @property
    def unpublished_chains(self) -> list[Chain]:
        """These chains, in order."""
        return [chain for chain, _ in self._pushed]

    def publish(self) -> bool:
        """Show all pushed chains to the driver; True when it wants an interrupt for them (2.7.7)."""
        if not self._pushed:
            return False
        self.store_used()
        return self.interrupt_due()

    def store_used(self, count: int | None = None) -> list[tuple[int, int]]:
        """Store the used entries of the first ``count`` pushed chains (default all), then the index.

        Returns the (offset, length) of what changed in the used ring, in the order that must be kept.
        """
        shown = self._pushed[:count]
        index, mask, used = self.used_idx, self._mask, self.used_bytes
        changed = []
        for chain, written in shown:
            # Entries beyond used.idx are not read by the driver yet: pack_into may touch them twice.
            offset = 4 + _USED_SIZE * (index & mask)
            _pack_used(used, offset, chain.head, written)
            changed.append((offset, _USED_SIZE))
            index = (index + 1) & 0xFFFF
        del self._pushed[: len(shown)]
        # Entries before the index (UR1): x86 keeps two stores in order; aarch64 needs telling.
        if not TSO:
            full_barrier()
        self._used_words[1] = self.used_idx = index
        changed.append((2, 2))
        return changed

    def interrupt_due(self) -> bool:
        """Whether what was stored since the last call must be followed by an interrupt."""
        # Orders our store of used.idx before our load of used_event (or flags).
        full_barrier()
        if not self.event_idx:
            return not self._avail[0] & _NO_INTERRUPT
        event = self._avail[2 + self.size]
        index = self.used_idx
        old, self._signalled_idx = self._signalled_idx, index
        first, self._signalled = not self._signalled, True
        # vring_need_event(): has used.idx moved past the entry the driver asked to hear of? Modulo 2^16.
        return first or (index - event - 1) & 0xFFFF < (index - old) & 0xFFFF

    # Where the two sides' wishes stand, for an owner that keeps copies: (offset, length).

    @property
    def notification_word(self) -> tuple[int, int]:
        """In the used ring: what `request_notification` stores."""
        return (4 + _USED_SIZE * self.size, 2) if self.event_idx else (0, 2)

    @property
    def interrupt_word(self) -> tuple[int, int]:
        """In the available ring: what `interrupt_due` looks at."""
        return (4 + 2 * self.size, 2) if self.event_idx else (0, 2)

    # ---- chains --------------------------------------------------------------------------------------------------

    def _chain(self, head: int) -> Chain:
        if head >= self.size:
            raise GuestError(
                f"available entry {self.last_avail & self._mask:#x} names descriptor {head:#x} of {self.size:#x}"
            )
        if head in self.in_flight:
            raise GuestError(f"descriptor {head:#x} was made available again while it is in flight")
        ranges: list[tuple[int, int]] = []
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        writable_from = readable_length = writable_length = 0
        for address, length, flags, _ in self._descriptors(head):
            if flags & WRITE:
                writable += self.memory.writable(address, length) if length else ()
                writable_length += length
            else:
                if writable_length:
                    raise GuestError(f"chain {head:#x}: a readable descriptor ({address:#x}) follows writable ones")
                readable += self.memory.readable(address, length) if length else ()
                readable_length += length
                writable_from += 1
            ranges.append((address, length))
        if readable_length + writable_length > MAX_CHAIN_BYTES:
            raise GuestError(f"chain {head:#x} is {readable_length + writable_length:#x} bytes long, more than 2^32")
        parts = Readable(readable, readable_length), Writable(writable, writable_length)
        return Chain(self, head, ranges, writable_from, parts)

    def _descriptors(self, head: int) -> list[Descriptor]:
        """The chain's descriptors, an indirect table at its end included; lengths, links and flags are checked."""
        size, table = self.size, self.desc_bytes
        index = head
        found: list[Descriptor] = []
        while True:
            descriptor = _unpack_desc(table, _DESC_SIZE * index)
            _, _, flags, following = descriptor
            if flags & INDIRECT:
                found += self._indirect(head, descriptor)
                return found
            found.append(descriptor)
            if not flags & NEXT:
                return found
            if following >= size:
                raise GuestError(f"chain {head:#x}: descriptor {index:#x} links to {following:#x} of {size:#x}")
            if len(found) >= size:
                raise GuestError(f"chain {head:#x}: its {size:#x} descriptors form a loop")
            index = following

    def _indirect(self, head: int, descriptor: Descriptor) -> list[Descriptor]:
        address, length, flags, _ = descriptor
        if not self.indirect:
            raise GuestError(f"chain {head:#x}: an indirect descriptor, but INDIRECT_DESC was not negotiated")
        if flags & NEXT:
            raise GuestError(f"chain {head:#x}: an indirect descriptor with NEXT set (flags {flags:#x})")
        count = length // _DESC_SIZE
        if length % _DESC_SIZE or not 0 < count <= max(self.size, MAX_INDIRECT):
            raise GuestError(f"chain {head:#x}: an indirect table of {length:#x} bytes")
        # One copy, so that the driver cannot change what has been validated.
        table = b"".join(self.memory.readable(address, length))
        index = 0
        found: list[Descriptor] = []
        while True:
            entry = _unpack_desc(table, _DESC_SIZE * index)
            if entry[2] & INDIRECT:
                raise GuestError(f"chain {head:#x}: an indirect table inside an indirect table at {address:#x}")
            found.append(entry)
            if not entry[2] & NEXT:
                return found
            index = entry[3]
            if index >= count:
                raise GuestError(
                    f"chain {head:#x}: indirect table {address:#x} links to entry {index:#x} of {count:#x}"
                )
            if len(found) >= count:
                raise GuestError(f"chain {head:#x}: indirect table {address:#x} forms a loop")

    def revalidate(self, chain: Chain) -> None:
        """After a change of the memory map: are the chain's buffers where they were? Raises Unmapped if not."""
        if self._dead:
            raise Unmapped(f"chain {chain.head:#x}: its queue was reset since it was taken")
        homes: set[int] = set()
        for index, (address, length) in enumerate(chain.ranges):
            look_up = self.memory.writable if index >= chain.writable_from else self.memory.readable
            try:
                homes.update(id(view.obj) for view in look_up(address, length))
            except NeedsMessages:
                pass  # the chain has a copy of its own
        if not chain.lies_in(homes):
            raise Unmapped(f"chain {chain.head:#x}: its memory has moved since it was taken")


def _nothing() -> None:
    pass
