"""Virtqueue whose rings are watched: each look, each chain that is taken, each one that is used."""

from vfiouser_virtio.audit.chains import ChainWatch
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.packed import PackedWatch
from vfiouser_virtio.audit.split import SplitWatch
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.vring import Area, Chain, PackedRing, SplitRing
from vfiouser_virtio.vring.descriptors import Memory


class AuditedSplitRing(SplitRing):
    """`SplitRing` that tells its watch what it finds."""

    findings: Findings
    watch: SplitWatch

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """As `SplitRing`."""
        first = self.last_avail
        self.findings.tell(self.watch.looks, self.parts, first)
        refused = False
        try:
            return super().pop(limit, memory)
        except GuestError:
            refused = True
            raise
        finally:
            where = memory or self.memory
            self.findings.tell(self.watch.takes, self.parts, first, self.last_avail, where, refused=refused)

    def waiting(self) -> int:
        """Buffers that are available and have not been taken."""
        return int((self.parts[1].cast("H")[1] - self.last_avail) & 0xFFFF)

    def end(self) -> int:
        """Where the driver will put the next buffer."""
        return int(self.parts[1].cast("H")[1])

    def _store(self, used: list[int]) -> None:
        self.findings.tell(self.watch.stores, self.parts, self.used_idx)
        self.findings.tell(self.watch.uses, self.parts, used[::2], self.memory)
        super()._store(used)


class AuditedPackedRing(PackedRing):
    """`PackedRing` that tells its watch what it finds."""

    findings: Findings
    watch: PackedWatch

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """As `PackedRing`."""
        self.findings.tell(self.watch.looks, self.parts)
        position, before = self.next_avail, set(self._taken)
        try:
            return super().pop(limit, memory)
        except GuestError:
            self._tell(position, before, memory)
            round_trip = 2 * self.size
            room = self.size - (self.next_avail - self.next_used) % round_trip
            self.findings.tell(self.watch.refuses, self.parts, self.next_avail, room, memory or self.memory)
            raise
        finally:
            self._tell(position, before, memory)

    def waiting(self) -> int:
        """Buffers that are available and have not been taken."""
        return self.watch.waiting(self.parts, self.next_avail)

    def end(self) -> int:
        """Where the driver will put the next buffer."""
        return self.watch.end(self.parts, self.next_avail)

    def _tell(self, position: int, before: set[int], memory: Memory | None) -> None:
        """Of the chains that were taken: they are in flight in the order in which they were."""
        for head, chain in self._taken.items():
            if head not in before:
                before.add(head)
                where = memory or self.memory
                self.findings.tell(self.watch.takes, self.parts, position % self.size, chain.slots, where)
                position = (position + chain.slots) % (2 * self.size)

    def _store(self, used: list[int]) -> None:
        places = []
        position = self.next_used
        for head in used[::2]:
            slots = self.in_flight[head].slots
            places.append((head, position % self.size, slots))
            position += slots
        self.findings.tell(self.watch.uses, self.parts, places)
        super()._store(used)


class AuditedVirtqueue(Virtqueue):
    """`Virtqueue` whose rings have a watch; ``watch_with`` comes before it is enabled."""

    split_ring = AuditedSplitRing
    packed_ring = AuditedPackedRing
    findings: Findings
    chains: ChainWatch | None = None

    def watch_with(self, findings: Findings, chains: ChainWatch | None) -> None:
        """What is found goes there; ``chains`` is told of what is asked of the device."""
        self.findings = findings
        self.chains = chains

    def singles(self, limit: int, flags: int) -> Singles | None:
        """None: each buffer is to be seen, once, and these are taken past `pop`, some of them back from a burst."""
        del limit, flags
        return None

    def reset(self) -> None:
        """As `Virtqueue`; what was in flight is the driver's again."""
        if self.chains is not None:
            self.findings.tell(self.chains.queue_reset, self.index)
        super().reset()

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        bound = super()._new_ring(areas)
        ring = bound.ring
        if isinstance(ring, AuditedSplitRing):
            ring.findings = self.findings
            ring.watch = SplitWatch(self.index, self.size, self.features, self.findings, self.chains)
        elif isinstance(ring, AuditedPackedRing):
            ring.findings = self.findings
            ring.watch = PackedWatch(self.index, self.size, self.features, self.findings, self.chains)
        return bound

    def waiting(self) -> int:
        """Buffers that are available and have not been taken; as many as there can be where they cannot be counted."""
        if self._bound is None:
            return 0
        ring = self.visible_ring()
        return self.size if ring is None else ring.waiting()

    def visible_ring(self) -> AuditedSplitRing | AuditedPackedRing | None:
        """The ring, if it can be looked at now."""
        bound = self._bound
        if bound is None or not bound.bind() or bound.by_message:
            return None
        ring = bound.ring
        return ring if isinstance(ring, AuditedSplitRing | AuditedPackedRing) else None
