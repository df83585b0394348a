"""Rings alone, in step with their model: what a driver stores, what the ring makes of it, what a device stores.

Found is an exception that is not declared, a ring that gives other buffers than `ring_model` (a view of the wrong
bytes, a buffer that is in flight, a loop that is not seen), and a byte of guest memory that is not what it should be.
"""

from collections.abc import Callable, Sequence
from itertools import starmap

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.bench import Op
from vfiouser_virtio.testing.fuzz.parsers.memory import BASE, BOUNDARY, FRESH, FlatMemory
from vfiouser_virtio.testing.fuzz.parsers.ring_model import (
    WRITE,
    Buffer,
    Look,
    PackedModel,
    RingModel,
    RingSetUp,
    SplitModel,
)
from vfiouser_virtio.testing.fuzz.parsers.ring_serving import WAYS, pieces_of, same, stamped
from vfiouser_virtio.vring import Area, Chain, PackedRing, Ring, RingFeatures, RingState, SplitRing, ring_areas
from vfiouser_virtio.vring.descriptors import POP_BUDGET

PARAMETERS: dict[str, tuple[str, ...]] = {
    "store": ("at", "data"),
    "pop": ("limit",),
    "singles": ("limit", "write", "undo"),
    "serve": ("which", "how", "count"),
    "publish": ("how",),
    "ask": (),
    "suppress": (),
    "look": (),
    "changed": (),
    "undo": (),
    "move": (),
}
"""Of each step, by name, as in the file of a finding."""

_KEPT = 256


class RingBench:
    """Bench for one kind of ring, of the package's class or another; `run` it for case after case."""

    def __init__(self, *, packed: bool, ring: type[Ring] | None = None) -> None:
        self._packed = packed
        self._ring_class = ring or (PackedRing if packed else SplitRing)
        self.memory = FlatMemory()
        self._methods: dict[str, Callable[..., None]] = {name: getattr(self, "_" + name) for name in PARAMETERS}
        self._areas: dict[RingSetUp, tuple[RingFeatures, list[Area]]] = {}
        self._ring: Ring
        self._model: RingModel
        self._held: list[tuple[Chain, Buffer]] = []
        self._last: Chain | None = None
        self._stamp = 0

    def close(self) -> None:
        """Unmap its memory."""
        self.memory.close()

    def run(self, ring: RingSetUp, ops: Sequence[Op], image: bytes = FRESH) -> None:
        """Play a case. Raises `Found`, or what a parser raises that it may not."""
        memory, methods = self.memory, self._methods
        memory.begin(image)
        self._held = []
        self._last = None
        self._stamp = 0
        self._model = (PackedModel if self._packed else SplitModel)(memory, ring)
        self._ring = self._set_up(ring)
        if ring.available or ring.used:
            self._ring.restore(RingState(ring.available, ring.used, ring.used, (), ()))
        try:
            for op in ops:
                methods[op[0]](*op[1:])
        except _RefusedRing:
            self._ring.kill()
        if not memory.is_as_expected():
            at = memory.first_difference()
            raise Found(
                "write",
                f"byte {at:#x} of guest memory is {memory.bytes[at]:#x}, where {memory.expected[at]:#x} should be",
                _place(ring, at),
            )

    def _set_up(self, ring: RingSetUp) -> Ring:
        """As a virtqueue makes and binds it."""
        guest = self.memory.guest
        features, areas = self._areas.get(ring) or self._find_areas(ring)
        made = self._ring_class(ring.size, guest, features)
        views = [(guest.writable if area.write else guest.readable)(area.address, area.length)[0] for area in areas]
        made.bind(*views)
        return made

    def _find_areas(self, ring: RingSetUp) -> tuple[RingFeatures, list[Area]]:
        """Its features, and where its parts lie, which many cases have in common."""
        features = RingFeatures(ring.indirect, ring.event_idx, ring.packed, ring.in_order)
        places = (BASE + ring.desc, BASE + ring.driver, BASE + ring.device)
        areas = ring_areas(ring.size, features, *places)
        for area in areas:
            self.memory.guest.check(area.address, area.length, write=area.write)
        if len(self._areas) >= _KEPT:
            self._areas.clear()
        self._areas[ring] = features, areas
        return features, areas

    # ---- the driver ----------------------------------------------------------------------------------------------

    def _store(self, at: int, data: bytes) -> None:
        self.memory.store(at, data)

    # ---- taking --------------------------------------------------------------------------------------------------

    def _pop(self, limit: int) -> None:
        look = self._model.look(limit)
        try:
            chains = self._ring.pop(limit)
        except GuestError as error:
            if look.problem != "broken":
                raise Found("differs", f"{error}: but nothing is wrong with it", "pop refuses") from error
            raise _RefusedRing from None
        except NeedsMessages:
            if look.problem != "messages" or look.buffers:
                raise Found("differs", "NeedsMessages, but memory is mapped", "pop needs messages") from None
            return
        self._compare(chains, look)

    def _compare(self, chains: list[Chain], look: Look) -> None:
        buffers, count = look.buffers, len(chains)
        if count > len(buffers):
            raise Found("differs", f"pop takes {count} buffers of {len(buffers)}", "pop takes more")
        if count < len(buffers) or (look.problem and (look.problem == "broken" or not count)):
            # It may end early, when there was much to look at; else what is behind must have been seen.
            # A table that is looked at as a whole costs an eighth of its entries, and if that was in vain those that
            # are linked, too.
            looked_at = sum(len(buffer.ranges) + buffer.table // 8 for buffer in buffers[:count])
            if not count or looked_at <= POP_BUDGET:
                raise Found(
                    "differs",
                    f"pop takes {count} buffers of {len(buffers)}, behind which the ring is {look.problem or 'empty'}",
                    "pop takes less",
                )
        # What lies apart was looked up one by one.
        slowly = [len(chain.layout) // 4 for chain in chains[:-1] if max(chain.layout[::4], default=0) >= BOUNDARY]
        if sum(slowly) > POP_BUDGET:
            raise Found("differs", f"pop looks at {sum(slowly)} descriptors, and then takes another chain", "budget")
        held = self._held
        for chain, buffer in zip(chains, buffers, strict=False):
            key, ranges, writable_from, slots, _ = buffer
            if chain.head != key or chain.ranges != ranges or chain.writable_from != writable_from:
                raise Found(
                    "differs",
                    f"chain {chain.head:#x} is {_ranges(chain.ranges, chain.writable_from)}, "
                    f"where {key:#x} {_ranges(ranges, writable_from)} should be",
                    "pop takes another",
                )
            if self._packed and chain.slots != slots:
                raise Found("differs", f"chain {key:#x} takes {chain.slots} descriptors, not {slots}", "slots")
            held.append((chain, buffer))
        if chains:
            self._last = chains[-1]
            self._model.take(buffers[:count])

    def _singles(self, limit: int, write: bool, undo: int) -> None:
        ring, model, memory = self._ring, self._model, self.memory
        buffers = model.look(limit).buffers
        singles = ring.pop_singles(limit, WRITE if write else 0)
        if len(singles) > (0 if model.ring.in_order else len(buffers)):
            raise Found("differs", f"{len(singles)} single buffers of {len(buffers)}", "pop_singles takes more")
        kept = max(len(singles) - undo, 0)
        view = memory.guest.hot[2]
        for number, (head, offset, length) in enumerate(singles):
            key, ranges, writable_from, _, _ = buffers[number]
            if head != key or len(ranges) != 1 or ranges[0][1] != length or writable_from != (0 if write else 1):
                raise Found("differs", f"single buffer {head:#x} is none, or another one", "pop_singles takes another")
            pieces = pieces_of(*ranges[0], write=write)
            begin, end = pieces[0][0], pieces[-1][1]  # neighbours in one window are one view
            if bytes(view[offset : offset + length]) != memory.expected[begin:end]:
                raise Found("differs", f"single buffer {head:#x} does not lie at {ranges[0][0]:#x}", "pop_singles view")
            written = 0
            if number < kept:
                if write:
                    written = min(length, 24)
                    data = stamped(written, self._stamp)
                    view[offset : offset + written] = data
                    memory.expected[begin : begin + written] = data
                ring.completed += head, written
                model.complete(head, written)
        ring.undo_singles(singles[kept:])
        model.take(buffers[:kept])
        self._publish("show")

    def _undo(self) -> None:
        chain, self._last = self._last, None
        if chain is not None and self._held and self._held[-1][0] is chain and self._ring.undo_pop(chain):
            _, buffer = self._held.pop()
            self._model.give_back(buffer)

    def _move(self) -> None:
        """Another ring goes on where this one is, as after a restart."""
        old = self._ring
        self._ring = self._set_up(self._model.ring)
        self._ring.restore(old.state())
        old.kill()
        self._last = None
        held = {buffer.key: buffer for _, buffer in self._held}
        again: list[tuple[Chain, Buffer]] = []
        while self._ring.again:
            for chain in self._ring.retake(64):
                buffer = held.pop(chain.head, None)
                if buffer is None or (chain.ranges, chain.writable_from) != buffer[1:3]:
                    raise Found("differs", f"chain {chain.head:#x} is another one when it is retaken", "retake")
                again.append((chain, buffer))
        if held:
            raise Found("differs", f"chains {list(held)} are lost in another ring", "restore")
        self._held = again

    def _changed(self) -> None:
        """The memory map is another one, in which all of it lies where it did."""
        self._ring.memory_changed()

    # ---- a device ------------------------------------------------------------------------------------------------

    def _serve(self, which: int, how: str, count: int) -> None:
        if not self._held:
            return
        chain, buffer = self._held.pop(which % len(self._held))
        self._stamp += 37
        written = WAYS[how](self.memory.expected, chain, buffer, count, self._stamp)
        self._model.complete(buffer.key, written)

    # ---- using ---------------------------------------------------------------------------------------------------

    def _publish(self, how: str) -> None:
        ring, model = self._ring, self._model
        self._last = None
        ready = len(model.ready())
        same(ring.unpublished, ready, "unpublished")
        if how == "publish":
            due = ring.publish()
            model.show()
            expected = model.interrupt_due() if ready else False
        elif how == "show":
            same(ring.show(), ready, "shown")
            model.show()
            due, expected = ring.interrupt_due(), model.interrupt_due()
        else:
            changed = ring.store_used(1)
            model.show(1)
            same(bool(changed), bool(ready), "stored")
            due, expected = ring.interrupt_due(), model.interrupt_due()
        if expected is not None and due != expected:
            raise Found("differs", f"an interrupt is {'' if due else 'not '}due", "interrupt_due")

    def _ask(self) -> None:
        same(self._ring.request_notification(), self._model.ask(), "request_notification")

    def _suppress(self) -> None:
        self._ring.suppress_notifications()
        self._model.suppress()

    def _look(self) -> None:
        ring, model = self._ring, self._model
        same(ring.has_available(), model.has_available, "has_available")
        if ring.offers_buffer() and not model.has_available:
            raise Found("differs", "a buffer is offered where nothing is available", "offers_buffer")
        same(ring.outstanding, len(model.in_flight), "outstanding")
        same(set(ring.in_flight), set(model.in_flight), "in flight")


class _RefusedRing(Exception):
    """The ring is broken, as it should be: nothing more is done with it."""


def _ranges(ranges: list[tuple[int, int]], writable_from: int) -> str:
    readable, writable = ranges[:writable_from], ranges[writable_from:]
    return f"{' '.join(starmap('{:#x}+{:#x}'.format, readable))} | {' '.join(starmap('{:#x}+{:#x}'.format, writable))}"


def _place(ring: RingSetUp, at: int) -> str:
    """Roughly where a byte lies, so that two findings of one fault are told as one."""
    parts = {"desc": ring.desc, "driver": ring.driver, "device": ring.device}
    below = [(start, name) for name, start in parts.items() if start <= at < 0x1000]
    return max(below)[1] if below else "buffers"
