"""Base class of split and packed rings: chains in flight, completions, and what a change of the memory map means."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence

from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.vring.chain import DISOWNED, Chain, Moved
from vfiouser_virtio.vring.descriptors import INDIRECT, NEXT, POP_BUDGET, WRITE, Memory, make_chain
from vfiouser_virtio.vring.features import RingFeatures
from vfiouser_virtio.vring.in_order import AvailableOrder
from vfiouser_virtio.vring.state import BufferState, RingState

_BUFFER_FLAGS = NEXT | WRITE | INDIRECT

Single = tuple[int, int, int]
"""Buffer of one descriptor: its head, and where it lies in the views of `Memory.hot`, as offset and length in bytes."""


class Ring(ABC):
    """Ring of a virtqueue between set-up and reset. `bind` comes first, and again whenever memory moved.

    ``part`` is 0 for the descriptors, 1 for the driver's area, 2 for the device's. Every method that looks at the
    guest's side raises GuestError for what the driver must not do.
    """

    fetch_order: tuple[int, ...]
    """Parts that are fetched when they are reached by messages: the first says whether the others are needed."""

    def __init__(self, size: int, memory: Memory, features: RingFeatures) -> None:
        self.size = size
        self.memory = memory
        self.indirect = features.indirect
        self.event_idx = features.event_idx
        self.in_order = features.in_order
        self.parts: list[memoryview] = []
        """As they were bound: guest memory, or local copies that the owner keeps up to date."""
        self.on_push: Callable[[], None] | None = None
        """Called after every `Chain.complete`, so that the ring's owner can decide when to publish."""
        self.completed: list[int] = []
        """Head, bytes written, head, …: for `Chain.complete` to add to. One flat list, for one ``pack`` of it all."""
        self.again: list[int] = []
        """Heads of buffers in flight that are to be offered again, before any other: see `retake`."""
        self._restored: list[int] = []
        """Heads of buffers that were in flight in the ring before this one, in order."""
        self._order = AvailableOrder() if features.in_order else None
        self._dead = False
        self._all_stale = False

    # ---- where the ring is ---------------------------------------------------------------------------------------

    @abstractmethod
    def bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        """Use these views (or local copies) of the three parts; `ring_areas` has their sizes."""

    def kill(self) -> None:
        """The queue was reset: chains in flight have no buffers any more, and are not published."""
        self._dead = True
        self.on_push = None
        for chain in self.in_flight.values():
            chain.stale = True
        self._forget_taken()

    @abstractmethod
    def _forget_taken(self) -> None:
        """Refer to none of the chains in flight: they refer to the ring, and would go only when Python looks for
        garbage, all of them at once. 256 of 1024 descriptors each took 60 ms then, and 25 MB for each reset till then.
        """

    @property
    @abstractmethod
    def in_flight(self) -> dict[int, Chain]:
        """Chains that were taken and that the driver has not been shown as used, by head."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """How many chains are `in_flight`; quickly."""

    def memory_changed(self) -> None:
        """The memory map is another one: chains in flight look again before they touch their buffers."""
        # Behind a vIOMMU the map changes 512 times for one request of 1 MiB, mostly without a look in between.
        if not self._all_stale:
            self._all_stale = True
            for chain in self.in_flight.values():
                chain.stale = True

    # ---- the available side --------------------------------------------------------------------------------------

    @abstractmethod
    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """Take up to ``limit`` chains in the order in which they were made available.

        Buffers and tables are looked up in ``memory``, by default the ring's own. Raises GuestError for a broken ring;
        NeedsMessages, with nothing taken, where memory must be fetched first.
        """

    @abstractmethod
    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        """As `pop`, of buffers with one descriptor each, without a chain for any of them; it ends before another kind.

        So what is no such buffer, what is wrong with it, and all of a ring with IN_ORDER is left to `pop`. ``flags``:
        WRITE, or 0 for what the device is to read. They are completed, or given back with `undo_singles`, before
        anything else happens to the ring or to the memory map.
        """

    @abstractmethod
    def undo_singles(self, singles: Sequence[Single]) -> None:
        """Make these available again, the last that `pop_singles` has handed out, as if they had never been taken."""

    @abstractmethod
    def undo_pop(self, chain: Chain) -> bool:
        """The same for a chain that was taken last, and nothing done with; False where that is not known."""

    @abstractmethod
    def has_available(self) -> bool:
        """Whether the driver has made more available."""

    @abstractmethod
    def offers_buffer(self) -> bool:
        """Whether something is available that a driver can have meant.

        For looks that no notification has asked for: a ring that firmware has left behind, in memory that is used for
        something else by now, holds anything. Nothing is stored.
        """

    def _is_buffer(self, address: int, length: int, flags: int) -> bool:
        """Whether a descriptor is one that a driver can have meant, with NEXT, WRITE and INDIRECT in ``flags``."""
        if not length or flags & ~_BUFFER_FLAGS or (flags & INDIRECT and not self.indirect):
            return False
        try:
            (self.memory.writable if flags & (WRITE | INDIRECT) == WRITE else self.memory.readable)(address, length)
        except Unmapped:
            return False
        except NeedsMessages:
            return True
        return True

    @abstractmethod
    def may_be_next(self, value: int) -> bool:
        """Whether the driver can be there: what a notification with data says (2.9), see `NOTIFICATION_DATA`."""

    @abstractmethod
    def suppress_notifications(self) -> None:
        """Tell the driver not to notify us: we look at the ring ourselves (2.7.10, 2.8.10)."""

    @abstractmethod
    def withdraw_request(self) -> None:
        """Undo `request_notification`, which has found nothing: we look at the ring ourselves again."""

    @abstractmethod
    def request_notification(self) -> bool:
        """Ask for a notification of the next chain; True when one is there already, so that no wait is needed."""

    # ---- the used side -------------------------------------------------------------------------------------------

    def _ready(self) -> list[int]:
        """What may be shown, as in `completed`."""
        return self.completed if self._order is None else self._order.release(self.completed)

    @property
    def unpublished(self) -> int:
        """How many chains could be shown to the driver now."""
        return len(self._ready()) // 2

    @property
    def unpublished_chains(self) -> list[Chain]:
        """These chains, in order."""
        in_flight = self.in_flight
        return [in_flight[head] for head in self._ready()[::2]]

    @abstractmethod
    def publish(self) -> bool:
        """Show all that may be shown to the driver; True when it wants an interrupt for it (2.7.7, 2.8.10)."""

    def show(self) -> int:
        """As `publish`, but `interrupt_due` is left to the caller: how many were shown."""
        ready = self._ready()
        count = len(ready) // 2
        if count:
            self._store(ready)
            ready.clear()
        return count

    def store_used(self, count: int | None = None) -> list[tuple[int, int, int]]:
        """Show the first ``count`` of them (default all), for an owner that keeps copies.

        Returns the (part, offset, length) of what has changed, in the order that must be kept.
        """
        ready = self._ready()
        first = ready if count is None else ready[: 2 * count]
        if not first:
            return []
        changed = self._places(first)
        self._store(first)
        del ready[: len(first)]
        return changed

    @abstractmethod
    def _store(self, used: list[int]) -> None:
        """Store these used elements, at least one, so that the driver sees all of them or none."""

    @abstractmethod
    def _places(self, used: list[int]) -> list[tuple[int, int, int]]:
        """What `_store` will change: see `store_used`."""

    @abstractmethod
    def interrupt_due(self) -> bool:
        """Whether what was stored since the last call must be followed by an interrupt."""

    # Where the two sides' suppression flags and events are, for an owner that keeps copies: (part, offset, length).

    @property
    @abstractmethod
    def notification_word(self) -> tuple[int, int, int]:
        """What `request_notification` stores."""

    @property
    @abstractmethod
    def interrupt_word(self) -> tuple[int, int, int]:
        """What `interrupt_due` looks at."""

    # ---- going on with another device, or elsewhere ----------------------------------------------------------------

    def offer_again(self, chains: Iterable[Chain] | None = None) -> list[int]:
        """`retake` these chains of the ring, by default all that were not completed, before any other.

        The old ones are of no use any more. Returns their heads.
        """
        if chains is None:
            in_flight = self.in_flight
            chains = [chain for head in self._taken_order() if (chain := in_flight[head]).ring is self]
        heads = []
        for chain in chains:
            chain.disown()
            heads.append(chain.head)
        self.again[:0] = heads
        return heads

    def retake(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """As `pop`, of the buffers that are offered again. Raises Unmapped as well.

        Like `pop` it ends early when there has been much to look at.
        """
        chains: list[Chain] = []
        in_flight, budget = self.in_flight, POP_BUDGET
        self._all_stale = False
        try:
            for head in self.again[:limit]:
                old = in_flight[head]
                first = old.writable_from
                descriptors = [
                    (address, length, WRITE if index >= first else 0, 0)
                    for index, (address, length) in enumerate(old.ranges)
                ]
                chain = make_chain(self, memory or self.memory, head, descriptors, self._slots(old))
                self._put(chain)
                chains.append(chain)
                budget -= len(descriptors)
                if budget < 0:
                    break
        except (NeedsMessages, Unmapped):
            if not chains:
                raise
        finally:
            del self.again[: len(chains)]
        return chains

    def state(self, again: Collection[int] = ()) -> RingState:
        """What the ring remembers. Chains whose heads are in ``again`` count as not completed, even if they are."""
        in_flight = self.in_flight
        pairs = self.completed if self._order is None else self._order.completed() + self.completed
        completed = zip(pairs[::2], pairs[1::2], strict=True)
        available, used, signalled = self._positions
        return RingState(
            available=available,
            used=used,
            signalled=signalled,
            buffers=tuple(self._saved(in_flight[head]) for head in self._taken_order()),
            completed=tuple((head, written) for head, written in completed if head not in again),
        )

    def restore(self, state: RingState) -> None:
        """Go on where another ring of the same size and features was. Raises ValueError for what is no ring's state."""
        heads = [buffer.head for buffer in state.buffers]
        completed = dict(state.completed)
        if len(set(heads)) < len(heads) or not completed.keys() <= set(heads):
            raise ValueError(f"chains {heads}, of which {list(completed)} are completed, are no state of a ring")
        self._positions = state.available, state.used, state.signalled
        for buffer in state.buffers:
            self._put(_disowned(buffer))
        if self._order is not None:
            self._order.take(heads)
        self.completed += [number for pair in state.completed for number in pair]
        self.again = [head for head in heads if head not in completed]
        self._restored = heads

    def _saved(self, chain: Chain) -> BufferState:
        ranges, first = chain.ranges, chain.writable_from
        return BufferState(
            head=chain.head, slots=self._slots(chain), readable=tuple(ranges[:first]), writable=tuple(ranges[first:])
        )

    @property
    @abstractmethod
    def _positions(self) -> tuple[int, int, int]:
        """Available, used, signalled: see `RingState`."""

    @_positions.setter
    @abstractmethod
    def _positions(self, positions: tuple[int, int, int]) -> None: ...

    @abstractmethod
    def _taken_order(self) -> list[int]:
        """The heads of all chains in flight, in the order in which they were made available as far as that is known."""

    @abstractmethod
    def _slots(self, chain: Chain) -> int:
        """Descriptors of the ring that it takes; 0 where that is not needed."""

    @abstractmethod
    def _put(self, chain: Chain) -> None:
        """This is the chain in flight with its head."""

    # ---- chains --------------------------------------------------------------------------------------------------

    def revalidate(self, chain: Chain) -> None:
        """After a change of the memory map: are the chain's buffers where they were? Raises Unmapped or Moved."""
        self._all_stale = False
        if self._dead:
            chain.drop_buffers()
            return
        homes: set[int] = set()
        for index, (address, length) in enumerate(chain.ranges):
            look_up = self.memory.writable if index >= chain.writable_from else self.memory.readable
            try:
                if length:
                    homes.update(id(view.obj) for view in look_up(address, length))
            except NeedsMessages:
                pass  # the chain has a copy of its own
        if not chain.is_within(homes):
            raise Moved(f"chain {chain.head:#x}: its memory has moved since it was taken")


def _disowned(buffer: BufferState) -> Chain:
    """The place of a chain in flight, until it is taken again or shown as used."""
    ranges = buffer.readable + buffer.writable
    layout = [number for address, length in ranges for number in (address, length, 0, 0)]
    room = sum(length for _, length in buffer.writable)
    return Chain.of(DISOWNED, buffer.head, layout, len(buffer.readable), room, None, buffer.slots)
