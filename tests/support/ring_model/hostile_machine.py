"""The device's rings under a driver that changes anything at any time.

Whatever it does, the ring gives GuestError or a chain that is legal in itself, and the device writes to the part of the
ring that is its own and to the buffers of that chain, nowhere else.
"""

import random
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.ring_model.driver import INDIRECT, NEXT, WRITE, Driver
from support.ring_model.packed import AVAIL, USED, PackedDriver
from support.ring_model.places import BASES, CUTS, DIRECT, TABLES_END, Buffers, layout
from support.ring_model.ram import HALF, SIZE, Ram
from support.ring_model.split import SplitDriver

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.vring import Chain, Ring, RingFeatures, make_ring, ring_areas

NUMBERS = [0, 1, 2, 3, 7, 8, 16, 24, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
LENGTHS = [0, 1, 16, 17, 32, 48, 16 * 1024, 16 * 1025, HALF, SIZE, 0x7FFF_FFFF, 0xFFFF_FFFF]
FLAGS = [0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 0xFFFF]
TURNS = [0, AVAIL, USED, AVAIL | USED]
KINDS = ["number", "noise", "descriptor", "twice", "index", "remap"]
MAX_CHAIN_BYTES = 1 << 32


class HostileMachine(RuleBasedStateMachine):
    """One ring. Subclasses choose the kind."""

    packed = False

    ring: Ring
    driver: Driver

    @initialize(
        indirect=st.sampled_from([True, True, False]),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        base=BASES,
        size=st.sampled_from([0, 1, 2, 2, 3]),
        seed=st.integers(0, 1 << 32),
    )
    def start(self, indirect: bool, event_idx: bool, in_order: bool, base: int, size: int, seed: int) -> None:
        self.features = RingFeatures(indirect=indirect, event_idx=event_idx, in_order=in_order, packed=self.packed)
        self.rng = random.Random(seed)
        self.ram = Ram(base)
        self.size = 1 << size
        self.chains: list[Chain] = []
        self._set_up()

    def _set_up(self) -> None:
        features, ram = self.features, self.ram
        self.errors = 0
        ram.write(ram.base, bytes(TABLES_END))
        self.buffers = Buffers(ram, self.rng)
        self.layout = layout(ram.base, self.rng)
        options: dict[str, Any] = {"event_idx": features.event_idx, "in_order": features.in_order, "rng": self.rng}
        kind: type[PackedDriver | SplitDriver] = PackedDriver if self.packed else SplitDriver
        self.driver = kind(ram, self.size, self.layout, **options)
        self.ring = make_ring(self.size, ram.memory, features)
        self.areas = ring_areas(self.size, features, self.layout.desc, self.layout.driver, self.layout.device)
        self._bind()

    def _bind(self) -> None:
        memory = self.ram.memory
        self.ring.bind(
            *((memory.writable if area.write else memory.readable)(area.address, area.length)[0] for area in self.areas)
        )

    def teardown(self) -> None:
        if hasattr(self, "ram"):
            self.ram.close()

    # ---- the driver ----------------------------------------------------------------------------------------------

    @rule(
        kinds=st.lists(st.sampled_from(KINDS), max_size=2),
        seed=st.integers(0, 1 << 32),
    )
    def meddle(self, kinds: list[str], seed: int) -> None:
        """The driver stores what it should not."""
        rng = random.Random(seed)
        for kind in kinds:
            if kind == "number":
                area = rng.choice(self.areas)
                self.ram.put(area.address + 2 * rng.randrange(area.length // 2), 2, rng.choice(NUMBERS))
            elif kind == "noise":
                start, length = rng.choice(
                    [*((a.address, a.length) for a in self.areas), (self.layout.tables[0], 0x100)]
                )
                self.ram.put(start + rng.randrange(length), 1, rng.randrange(256))
            elif kind == "descriptor":
                self._store_descriptor(rng)
            elif kind == "twice":
                self._offer_twice(rng)
            elif kind == "index":
                self._move_on(rng.choice([1, 1, 2, 8, 9, 0xFFFF]))
            else:
                self.ram.remap()
                for chain in self.ring.in_flight.values():
                    chain.stale = True
                self._bind()

    @rule(
        add=st.tuples(CUTS, DIRECT),
        limit=st.sampled_from([64, 64, 1]),
        shares=st.lists(st.sampled_from([0, 1, 300]), max_size=3),
        publish=st.sampled_from(["all", "all", "some", "nothing"]),
        ask=st.booleans(),
        collect=st.booleans(),
        repeat=st.integers(1, 3),
        meddle=st.sampled_from(["", "", "", "descriptor", *KINDS]),
        seed=st.integers(0, 1 << 16),
    )
    def work(
        self,
        add: tuple[list[tuple[int, bool]], int],
        limit: int,
        shares: list[int],
        publish: str,
        ask: bool,
        collect: bool,
        repeat: int,
        meddle: str,
        seed: int,
    ) -> None:
        """The device does what it always does; the driver adds what is right, so that what is wrong is met later."""
        self._notifications(ask)
        self._pop(limit)
        for share in shares[: len(self.chains)]:
            self._complete(seed, share)
        own = [(area.address, area.length) for area in self.areas if area.write]
        if publish == "all":
            self._try(self.ring.publish, *own)
        elif publish == "some":
            self._try(lambda: self.ring.store_used(1 + seed % 2), *own)
            self._try(self.ring.interrupt_due)
        if collect:
            self._collect()
        for _ in range(repeat):
            self._add(*add)
            if meddle:
                self.meddle([meddle], seed)
        if self.errors > 2:
            # A device in this state is reset, or nothing else would ever come.
            self.ring.kill()
            self._set_up()

    # ---- the driver ----------------------------------------------------------------------------------------------

    def _add(self, cut: list[tuple[int, bool]], direct: int) -> None:
        """Readable after writable now and then: not even that is always right."""
        cut = cut[: self.size] if direct == 1 else sorted(cut[: self.size], key=lambda piece: piece[1])
        if not self.features.indirect or (self.packed and direct):
            direct = len(cut)
        if len(cut) <= self.driver.free() and len(cut) < len(self.buffers.free) and self.driver.free_tables:
            self.driver.add(self.buffers.make(cut), min(direct, len(cut)))
            self.driver.show()

    def _collect(self) -> None:
        """Take used buffers, where the ring still makes sense to a driver that keeps the rules."""
        try:
            for buffer, _ in self.driver.collect():
                self.buffers.give_back(buffer.elements)
        except (AssertionError, IndexError):
            pass

    def _store_descriptor(self, rng: random.Random) -> None:
        """One field of a descriptor, mostly of one that the device has not taken yet."""
        entries = [self.layout.desc + 16 * rng.randrange(self.size)]
        for buffer in self.driver.outstanding[-2:]:
            entries += [self.layout.desc + 16 * place for place in buffer.descriptors]
            entries += [table + 16 * place for table in buffer.tables for place in range(len(buffer.elements))]
        entry, base = rng.choice(entries), self.ram.base
        number, flags = (12, 14) if self.packed else (14, 12)
        kept = self.ram.get(entry + flags, 2) & (AVAIL | USED) if rng.random() < 0.8 else rng.choice(TURNS)
        edges = [base, base + HALF - 1, base + SIZE - 1, base + SIZE, (1 << 64) - 1, 0, self.layout.tables[0]]
        offset, size, value = rng.choice(
            [
                (0, 8, rng.choice([*edges, *(area.address for area in self.areas)])),
                (8, 4, rng.choice(LENGTHS)),
                (number, 2, rng.choice(NUMBERS)),
                (flags, 2, rng.choice(FLAGS) | kept),
            ]
        )
        self.ram.put(entry + offset, size, value)

    def _offer_twice(self, rng: random.Random) -> None:
        """The same head in two available entries, or the same id in two descriptors."""
        driver = self.driver
        if isinstance(driver, PackedDriver):
            latest = driver.next[0]
        else:
            assert isinstance(driver, SplitDriver)
            latest = driver.avail_idx
        one, other = (latest - 1) % self.size, rng.randrange(self.size)
        start, step = (self.layout.desc + 12, 16) if self.packed else (self.layout.driver + 4, 2)
        self.ram.put(start + step * one, 2, self.ram.get(start + step * other, 2))

    def _move_on(self, count: int) -> None:
        """avail.idx of a split ring, some entries on; of a packed ring all descriptors, into another state."""
        if self.packed:
            for place in range(self.size):
                flags = self.layout.desc + 16 * place + 14
                self.ram.put(flags, 2, self.ram.get(flags, 2) ^ TURNS[count % 4])
        else:
            index = self.layout.driver + 2
            self.ram.put(index, 2, (self.ram.get(index, 2) + count) & 0xFFFF)

    # ---- the device ----------------------------------------------------------------------------------------------

    def _pop(self, limit: int) -> None:
        """Nothing is written, and what comes is legal."""
        before = set(self.ring.in_flight)
        chains = self._try(lambda: self.ring.pop(limit)) or []
        assert len(chains) <= min(limit, self.size)
        assert not before & {chain.head for chain in chains}
        for chain in chains:
            lengths = [length for _, length in chain.ranges]
            split = chain.writable_from
            assert 0 < len(lengths) <= 1024
            assert sum(lengths) <= MAX_CHAIN_BYTES
            assert chain.readable.length == sum(lengths[:split])
            assert chain.writable.length == sum(lengths[split:])
            for part in chain.readable, chain.writable:
                assert sum(map(len, part.segments)) == part.length
            for address, length in chain.ranges:
                assert not length or self.ram.base <= address <= address + length <= self.ram.base + SIZE
            self.chains.append(chain)
        assert len(self.ring.in_flight) <= self.size

    def _complete(self, which: int, share: int) -> None:
        chain = self.chains.pop(which % len(self.chains))
        own = [(address, length) for address, length in chain.ranges[chain.writable_from :] if length]

        def work() -> None:
            chain.readable.read(min(chain.readable.length, 1000))
            if share and chain.writable.length > 1:
                chain.writable.take_last(1)[0][:] = b"?"
            chain.writable.write(b"!" * min(share, chain.writable.length))

        self._try(work, *own)
        self._try(chain.complete)

    def _notifications(self, ask: bool) -> None:
        self._try(self.ring.has_available)
        wish = self.ring.request_notification if ask else self.ring.suppress_notifications
        self._try(wish, (self.areas[2].address, self.areas[2].length))

    @invariant()
    def nothing_else_was_written(self) -> None:
        if hasattr(self, "ram"):
            self.ram.check()

    def _try(self, work: Callable[[], Any], *may_write: tuple[int, int]) -> Any:
        """GuestError is what a driver like this deserves; anything else is our bug."""
        try:
            return work()
        except GuestError:
            self.errors += 1
            return None
        finally:
            self.ram.check(*may_write)


class HostileSplit(HostileMachine):
    packed = False


class HostilePacked(HostileMachine):
    packed = True
