"""The device's rings under random, legal drivers, checked against the model after each step."""

import pickle
import random
from collections import deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.ring_model.driver import EVERY, NONE, Buffer, Driver, Position
from support.ring_model.packed import PackedDriver
from support.ring_model.places import BASES, CUTS, DIRECT, MAX_ELEMENTS, TABLES_END, Buffers, layout
from support.ring_model.ram import FAR, HALF, Ram
from support.ring_model.split import SplitDriver

from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.vring import Chain, Ring, RingFeatures, RingState, make_ring, ring_areas

# What is no work: see `DeviceMachine.meddle`.
MEDDLING = st.sampled_from(
    ["driver asks", "driver asks", "suppress", "request", "request", "look", "remap", "reset", "restore"]
)
MOSTLY = st.sampled_from([True, True, True, False])
WISHES = st.one_of(st.sampled_from([EVERY, NONE]), st.integers(0, 8))
SPLIT_SIZES = st.sampled_from([1, 2, 4, 8, 16])
PACKED_SIZES = st.integers(1, 9)
# Where a split ring's indexes begin: at 0, or about to wrap.
STARTS = st.sampled_from([0, 0xFFFD, 0xFFFE, 0xFFFF])


class DeviceMachine(RuleBasedStateMachine):
    """One ring, its model driver and what the device owes it. Subclasses choose the kind."""

    packed = False

    ram: Ram
    driver: Driver
    ring: Ring

    @initialize(
        indirect=st.sampled_from([True, True, False]),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        base=BASES,
        seed=st.integers(0, 1 << 32),
        data=st.data(),
    )
    def start(self, indirect: bool, event_idx: bool, in_order: bool, base: int, seed: int, data: Any) -> None:
        self.features = RingFeatures(indirect=indirect, event_idx=event_idx, in_order=in_order, packed=self.packed)
        self.rng = random.Random(seed)
        self.ram = Ram(base)
        self.buffers = Buffers(self.ram, self.rng)
        self.dead: list[Chain] = []
        """Of queues that were reset."""
        self.moved: set[Chain] = set()
        """In memory that has been remapped elsewhere since they were taken."""
        self._set_up(data)

    def _set_up(self, data: Any) -> None:
        """A new ring, of another size and in another place."""
        size = data.draw(PACKED_SIZES if self.packed else SPLIT_SIZES, label="size")
        self.layout = layout(self.ram.base, self.rng)
        self.ram.write(self.ram.base, bytes(TABLES_END))
        options: dict[str, Any] = {
            "event_idx": self.features.event_idx,
            "in_order": self.features.in_order,
            "rng": self.rng,
        }
        self.ring = make_ring(size, self.ram.memory, self.features)
        if self.packed:
            self.driver = PackedDriver(self.ram, size, self.layout, **options)
        else:
            first = data.draw(STARTS, label="first index")
            self.driver = SplitDriver(self.ram, size, self.layout, start=first, **options)
            start_at(self.ring, first)
        self.bind()
        self.waiting: deque[Buffer] = deque()
        """Shown to the device, which has not taken them."""
        self.taken: list[tuple[Buffer, Chain]] = []
        """In the order in which they were made available."""
        self.numbers: dict[int, int] = {}
        """By key: how many were taken before it."""
        self.popped = 0
        self.written: dict[int, int] = {}
        """By key: completed, and not published."""
        self.to_collect: list[tuple[Buffer, int]] = []
        """Published, and not collected."""
        self.asleep = False
        """The device waits for a notification, and there must be one for the next buffer."""
        self.silent = False
        """The device has said that it needs none."""
        self.request()  # as every device does first

    def bind(self) -> None:
        parts = ring_areas(self.driver.size, self.features, self.layout.desc, self.layout.driver, self.layout.device)
        memory = self.ram.memory
        views = [(memory.writable if part.write else memory.readable)(part.address, part.length) for part in parts]
        self.ring.bind(*(view for (view,) in views))

    def teardown(self) -> None:
        if hasattr(self, "ram"):
            self.ram.close()

    # ---- the driver ----------------------------------------------------------------------------------------------

    @rule(
        add=st.tuples(CUTS, DIRECT, st.integers(0, 4)),
        show=MOSTLY,
        pop=st.sampled_from([64, 64, 2, 1, 0]),
        shares=st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=5),
        status=st.booleans(),
        publish=st.sampled_from(["all", "all", "in parts", "nothing"]),
        collect=MOSTLY,
        seed=st.integers(0, 1 << 16),
    )
    def work(
        self,
        add: tuple[list[tuple[int, bool]], int, int],
        show: bool,
        pop: int,
        shares: list[float],
        status: bool,
        publish: str,
        collect: bool,
        seed: int,
    ) -> None:
        """Each side does some of what it may: what it leaves for later meets what comes then."""
        self.add(*add)
        if show and self.driver.added:
            self.show()
        if pop and self.waiting:
            self.pop(pop)
        for share in shares[: len(self.in_flight)]:
            self.complete(*self.in_flight[seed % len(self.in_flight)], share, status)
        if publish == "all":
            self.publish()
        elif publish == "in parts":
            self.publish_in_parts(1 + seed % 3)
        if collect:
            self.collect()

    def add(self, cut: list[tuple[int, bool]], direct: int, repeat: int) -> None:
        """Up to ``repeat`` buffers of these pieces; ``direct`` of them without an indirect table, where that may be."""
        cut = sorted(cut[: min(self.driver.size, MAX_ELEMENTS)], key=lambda piece: piece[1])
        count = len(cut)
        if not self.features.indirect or (self.packed and direct):
            direct = count
        direct = min(direct, count)
        for _ in range(repeat):
            has_tables = self.driver.free_tables or direct == count
            if direct + (direct < count) <= self.driver.free() and count <= len(self.buffers.free) and has_tables:
                self.driver.add(self.buffers.make(cut), direct)

    def show(self) -> None:
        """Make them available, and find out whether the device is notified: it must be if it sleeps."""
        shown = list(self.driver.added)
        self.driver.show()
        self.waiting += shown
        notified = self.driver.must_notify()
        if self.asleep:
            assert notified, "the device has gone to sleep and is not woken"
        if self.silent:
            assert not notified, "the device is notified although it has suppressed that"
        self.asleep = False

    def collect(self) -> None:
        """Take used buffers: those that were published, in order, with their lengths and contents."""
        for buffer, written in self.driver.collect():
            expected, length = self.to_collect.pop(0)
            assert buffer is expected
            if written is None:
                assert length == buffer.room, "a skipped buffer counts as written completely (2.7.9, 2.8.9)"
            else:
                assert written == length
            self.buffers.give_back(buffer.elements)
        assert not self.to_collect, "published buffers do not show"

    # ---- the device ----------------------------------------------------------------------------------------------

    def pop(self, limit: int) -> None:
        """Buffers come in the order in which they were made available, cut as the driver has cut them."""
        assert self.ring.has_available()
        chains = self.ring.pop(limit)
        assert len(chains) == min(limit, len(self.waiting))
        for chain in chains:
            buffer = self.waiting.popleft()
            assert chain.head == buffer.key
            assert chain.ranges == [(element.address, element.length) for element in buffer.elements]
            assert chain.writable_from == len(buffer.readable)
            assert chain.writable.length == chain.room == buffer.room
            assert chain.readable.length == sum(element.length for element in buffer.readable)
            self.taken.append((buffer, chain))
            self.numbers[buffer.key] = self.popped
            self.popped += 1
        self.ram.check()

    def complete(self, buffer: Buffer, chain: Chain, share: float, status: bool) -> None:
        """Read all of it, write some of it, give it back: only that memory changes."""
        if chain in self.moved:
            self._fail(buffer, chain)
            return
        assert chain.readable.read() == b"".join(
            self.ram.read(e.address, e.length) for e in buffer.readable if e.length
        )
        length = int(buffer.room * share)
        content = self.rng.randbytes(buffer.room)
        if status and length == buffer.room > 0:
            last = chain.writable.take_last(1)
            assert len(last) == 1, "the last byte of the buffer is not there"
            last[0][0] = content[-1]
            chain.writable.write(content[:-1])
            chain.complete(length)
        else:
            chain.writable.write(content[:length])
            chain.complete()
        position = 0
        for element in (element for element in buffer.writable if element.length):
            self.ram.expect(element.address, content[position : min(position + element.length, length)])
            position += element.length
        self.written[buffer.key] = length
        self.ram.check()

    def _fail(self, buffer: Buffer, chain: Chain) -> None:
        """All that a device can do with a chain whose memory has moved is to give it back."""
        for part in "readable", "writable":
            with pytest.raises(Unmapped):
                getattr(chain, part)
        chain.complete(0)
        self.moved.remove(chain)
        self.written[buffer.key] = 0
        self.ram.check()

    def publish(self) -> None:
        done = self._publishable()
        places = self.driver.publishing(done)
        due = self.ring.publish()
        self._published(done, places)
        assert due == (bool(done) and self.driver.interrupt_owed()), "an interrupt is lost, or one too many"

    def publish_in_parts(self, count: int) -> None:
        """As for memory that is reached by messages: the ring says what it has changed, and nothing else is."""
        done = self._publishable()[:count]
        assert self.ring.unpublished == len(self._publishable())
        assert [chain.head for chain in self.ring.unpublished_chains[:count]] == [buffer.key for buffer in done]
        self.ram.check()
        before = self.ram.real
        stored = self.ring.store_used(count)
        changed = [place for place, (old, new) in enumerate(zip(before, self.ram.real, strict=True)) if old != new]
        starts = self.layout.desc, self.layout.driver, self.layout.device
        told = [range(starts[part] + offset, starts[part] + offset + size) for part, offset, size in stored]
        assert all(any(self.ram.base + place in part for part in told) for place in changed)
        self._published(done, self.driver.publishing(done))
        if done:
            assert self.ring.interrupt_due() == self.driver.interrupt_owed()

    def suppress(self) -> None:
        self.ring.suppress_notifications()
        wish = self._device_wishes()
        if isinstance(self.driver, SplitDriver) and self.features.event_idx:
            # There is no word for "none": the entry that was asked for stays behind.
            self.silent = wish != self.driver.avail_idx
        else:
            assert wish == NONE
            self.silent = True
        self.asleep = False

    def request(self) -> None:
        assert self.ring.request_notification() is bool(self.waiting)
        self._device_wishes()
        self.asleep, self.silent = not self.waiting, False

    # ---- what may happen at any time -----------------------------------------------------------------------------

    def look(self) -> None:
        """Where there is nothing, nothing comes out of it."""
        assert self.ring.has_available() == bool(self.waiting)
        if not self.waiting:
            assert self.ring.pop(64) == []
        if not self._publishable():
            assert self.ring.unpublished == 0
            assert not self.ring.publish()
        if not self.to_collect:
            assert self.driver.collect() == []

    @rule(what=MEDDLING, wish=WISHES, data=st.data())
    def meddle(self, what: str, wish: int | str, data: Any) -> None:
        """What is no work: wishes, and what may happen to a queue at any time."""
        if what == "driver asks":
            self.driver.ask(min(wish, self.driver.size - 1) if isinstance(wish, int) else wish)
        elif what == "suppress":
            self.suppress()
        elif what == "request":
            self.request()
        elif what == "look":
            self.look()
        elif what == "remap":
            self.remap(low=data.draw(st.booleans()), high=data.draw(st.booleans()))
        elif what == "restore":
            self.restore()
        elif self.dead:
            self.complete_late()
        else:
            self.reset(data)

    def remap(self, *, low: bool, high: bool) -> None:
        """Memory goes and comes back: rings are bound again, chains in flight look again, and nothing is lost."""
        self.ram.remap(low=low, high=high)
        for chain in self.ring.in_flight.values():
            chain.stale = True
        self.bind()
        if self.ram.base == FAR:
            # Each region has a mapping of its own there, and views of the old one see nothing of the new one.
            middle = FAR + HALF
            for buffer, chain in self.in_flight:
                if any(
                    (low and e.address < middle) or (high and e.address + e.length > middle) for e in buffer.touched
                ):
                    self.moved.add(chain)

    def restore(self) -> None:
        """Another ring goes on with the state of this one: it offers again what is not completed, and all goes on."""
        state = pickle.loads(pickle.dumps(self.ring.state()))
        before = self.in_flight
        old, self.ring = self.ring, make_ring(self.driver.size, self.ram.memory, self.features)
        assert old.state() == state, "to ask for the state has changed it"
        self.ring.restore(state)
        self.bind()
        assert self.ring.state() == state
        chains: list[Chain] = []
        while self.ring.again:
            chains += self.ring.retake(3)
        expected = [buffer.key for buffer, _ in before]
        if self.packed or self.features.in_order:
            assert [chain.head for chain in chains] == expected
        else:
            # Of a split ring only the last ones are known in their order: as many as it has entries.
            assert sorted(chain.head for chain in chains) == sorted(expected)
            recent = [buffer.key for buffer, _ in before if self.numbers[buffer.key] >= self.popped - self.driver.size]
            assert [chain.head for chain in chains][len(expected) - len(recent) :] == recent
        again = {chain.head: chain for chain in chains}
        for buffer, _ in before:
            chain = again[buffer.key]
            assert chain.ranges == [(element.address, element.length) for element in buffer.elements]
            assert chain.writable_from == len(buffer.readable)
        self.taken = [(buffer, again.get(buffer.key, chain)) for buffer, chain in self.taken]
        self.moved -= {chain for _, chain in before}
        # Whoever has them, of the device before: nothing comes of it.
        for _, chain in before:
            chain.disown()
        self.dead += [chain for _, chain in before]

    def reset(self, data: Any) -> None:
        """Reset the queue and set it up again: late completions of its chains touch nothing."""
        self.ring.kill()
        self.dead += [chain for _, chain in self.in_flight]
        for buffer in [*self.driver.added, *self.driver.outstanding]:
            self.buffers.give_back(buffer.elements)
        self._set_up(data)

    def complete_late(self) -> None:
        """A chain of a queue that was reset meanwhile: its owner notices nothing, and neither does the memory."""
        chain = self.dead.pop()
        chain.writable.write(bytes(chain.writable.length))
        chain.complete()
        self.ram.check()

    @invariant()
    def nothing_else_was_written(self) -> None:
        if hasattr(self, "ram"):
            self.ram.check()

    # ---- inside --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[tuple[Buffer, Chain]]:
        return [(buffer, chain) for buffer, chain in self.taken if buffer.key not in self.written]

    def _publishable(self) -> list[Buffer]:
        """What is complete, in the order in which it must be published."""
        if not self.features.in_order:
            by_key = {buffer.key: buffer for buffer, _ in self.taken}
            return [by_key[key] for key in self.written]
        done = []
        for buffer, _ in self.taken:
            if buffer.key not in self.written:
                break
            done.append(buffer)
        return done

    def _published(self, done: list[Buffer], places: list[tuple[int, int]]) -> None:
        self.ram.check(*places)
        self.driver.published(done)
        self.to_collect += [(buffer, self.written.pop(buffer.key)) for buffer in done]
        self.taken = [(buffer, chain) for buffer, chain in self.taken if buffer not in done]

    def _device_wishes(self) -> Position:
        self.ram.check(self.driver.wish_area)
        return self.driver.device_wish()


def start_at(ring: Ring, index: int) -> None:
    """As if a split ring had been used so often before."""
    ring.restore(RingState(available=index, used=index, signalled=index, buffers=(), completed=()))


class SplitMachine(DeviceMachine):
    packed = False


class PackedMachine(DeviceMachine):
    packed = True
