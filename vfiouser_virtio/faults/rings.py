"""Rings that lie about used buffers: `Ring`'s used side once more, slowly, and with faults.

::

    Chain.complete ─▶ completed ─▶ _lie() ─▶ [UsedElement, …] ─▶ _put_used() ─▶ used ring
                          ▲          │
                          └── held ◀─┘  late, out of order, in a storm

What the device knows of its ring stays true: it takes buffers as before, and does not blame the driver for what it has
been told.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.later import Later
from vfiouser_virtio.faults.payload import Payload, UsedBuffer, spoil_data
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.vring import Chain, Ring

_LEN = 0xFFFF_FFFF
MAX_OVERWRITTEN = 1 << 16
"""Bytes of a driver's buffer that are overwritten: it names as many as it likes."""

_KEPT_BACK = ("used-late", "used-out-of-order", "used-storm")
_INSTEAD = (*_KEPT_BACK, "used-never", "used-id-out-of-range", "used-id-not-in-flight", "used-id-of-another")
"""Faults of which one at most happens to a buffer: the first of these."""

RingPlace = tuple[int, int, int]
"""Part of the ring, offset, length."""


class UsedElement(NamedTuple):
    """Used element as it will be stored."""

    head: int | None
    """The buffer that the driver gets back by it; None: the driver was told something else."""
    id: int
    length: int
    slots: int = 0
    """Descriptors of a packed ring that it stands for."""
    extra: bool = False
    """One that the device has no buffer for."""


@dataclass(frozen=True, slots=True)
class RingSeams:
    """Seams between a ring with faults and its virtqueue."""

    later: Later
    republish: Callable[[], None]
    """Show what may be shown."""
    show_late: Callable[[list[RingPlace]], None]
    """Show what was stored after that."""
    views: Callable[[Chain], list[memoryview] | None] = lambda _chain: None
    """Where the writable part of a chain lies, or its copy; None where that cannot be had."""
    overwrite: Callable[[int, bytes], None] = lambda _address, _data: None
    """Store bytes at a guest address, whatever is there."""
    overwrite_ring: Callable[[int, int, bytes], None] = lambda _part, _at, _data: None
    """The same, at an offset in a part of the ring."""
    payload: Payload | None = None
    """Faults of what the device writes."""


class FaultyRing(Ring):
    """Mixin before `SplitRing` or `PackedRing`. `arm` comes right after it was made."""

    faults: FaultPlan
    queue: int
    seams: RingSeams
    later: Later

    def arm(self, faults: FaultPlan, queue: int, seams: RingSeams) -> None:
        """What is to go wrong."""
        self.faults, self.queue, self.seams, self.later = faults, queue, seams, seams.later
        self._spoils = seams.payload is not None or faults.has(Place.DATA) or "desc-rewritten" in faults
        self._spoilt: set[int] = set()  # heads of completed buffers that `_spoil` has had
        self._held: dict[str, list[int]] = {"used-out-of-order": [], "used-storm": []}
        self._honest: set[int] = set()  # heads that were kept back, and whose turn it is
        self._given_back: dict[int, Chain] = {}  # by head: the driver was told that they are used, and they are not

    def _hit(self, name: str, possible: bool = True) -> Hit | None:
        return self.faults.hit(name, self.queue, possible=possible)

    # ---- what `Ring` promises ------------------------------------------------------------------------------------

    def publish(self) -> bool:
        return self.show() > 0 and self.interrupt_due()

    def show(self) -> int:
        ready = self._ready()
        given = ready[:]
        ready.clear()
        elements = self._lie(given)
        if elements:
            self._put_used(elements)
        return len(elements)

    def store_used(self, count: int | None = None) -> list[RingPlace]:
        ready = self._ready()
        count = len(ready) // 2 if count is None else count
        given = ready[: 2 * count]
        del ready[: 2 * count]
        elements = self._lie(given)
        return self._put_used(elements) if elements else []

    def interrupt_due(self) -> bool:
        due = super().interrupt_due()  # type: ignore[safe-super] # of the ring that comes after this class
        hit = self._hit("interrupt-unwanted")
        if hit is not None:
            hit.did("an interrupt that was due" if due else "an interrupt that the driver has suppressed")
        return due or hit is not None

    def request_notification(self) -> bool:
        hit, far = self._hit("notify-not-asked"), self._hit("event-far", self.event_idx)
        if hit is not None:
            hit.did("the driver was not asked to notify")
            return self.has_available()
        available = super().request_notification()  # type: ignore[safe-super] # as above
        if far is not None:
            self._set_event(far)
        return available

    @property
    def in_flight(self) -> dict[int, Chain]:
        return {**self._given_back, **super().in_flight}  # type: ignore[safe-super] # as above

    def say_honestly(self, chain: Chain, data: bytes) -> None:
        """Complete ``chain`` with ``data``: what the device has not said, and what is no opportunity for a fault."""
        self._honest.add(chain.head)
        chain.writable.write(data[: chain.writable.length])
        chain.complete()

    def _ready(self) -> list[int]:
        ready = super()._ready()
        if self._spoils:
            for at in range(0, len(ready), 2):
                head = ready[at]
                if head not in self._honest and head not in self._spoilt:
                    self._spoilt.add(head)
                    ready[at + 1] = self._spoil(self.in_flight[head], ready[at + 1])
        return ready

    def _spoil(self, chain: Chain, length: int) -> int:
        """Change what was written to a buffer that was completed; returns the length that the driver is told."""
        views = self.seams.views(chain)
        if views is None:
            return length
        readable = [each for each in chain.ranges[: chain.writable_from] if each[1]]
        if hit := self._hit("readable-overwritten", bool(readable)):
            address, size = readable[hit.draw(len(readable))]
            size = min(size, MAX_OVERWRITTEN)
            hit.did(f"{size:#x} bytes at {address:#x} are ones")
            self.seams.overwrite(address, b"\xff" * size)
        buffer = UsedBuffer(views, length)
        spoil_data(self.faults, self.queue, buffer)
        if self.seams.payload is not None:
            self.seams.payload.spoil(buffer)
        return buffer.length

    @abstractmethod
    def _set_event(self, hit: Hit) -> None:
        """Ask to be notified of another buffer than the next: `event-far`."""

    @abstractmethod
    def ghost(self, number: int, length: int) -> list[tuple[RingPlace, bytes]]:
        """What would show the next used element, with this id and length, and where; nothing is stored."""

    @abstractmethod
    def _put_used(self, elements: list[UsedElement]) -> list[RingPlace]:
        """Store them, and show them to the driver; what has changed, in the order that must be kept."""

    # ---- lies about single buffers -------------------------------------------------------------------------------

    def _lie(self, given: list[int]) -> list[UsedElement]:
        elements: list[UsedElement] = []
        for head, length in zip(given[::2], given[1::2], strict=True):
            self._spoilt.discard(head)
            if head in self._honest:
                self._honest.discard(head)
                elements.append(self._true(head, length))
            else:
                elements += self._of_one(head, length)
        return elements

    def _true(self, head: int, length: int) -> UsedElement:
        return UsedElement(head, head, length, self._slots(self.in_flight[head]))

    def _of_one(self, head: int, length: int) -> list[UsedElement]:
        """The elements for one buffer, and for those that were kept back until it came."""
        # All are counted, whichever happens: a schedule does not depend on other faults.
        others = self._others(head) if "used-id-of-another" in self.faults else []
        first: tuple[str, Hit] | None = None
        for name in _INSTEAD:
            if hit := self._hit(name, first is None and (name != "used-id-of-another" or bool(others))):
                first = name, hit
        long = self._hit("used-len-long", first is None)
        short = self._hit("used-len-short", first is None)
        twice = self._hit("used-twice", first is None)
        if first is not None and first[0] in _KEPT_BACK:
            return self._keep_back(*first, head, length)
        if first is not None:
            elements = self._instead(*first, head, length, others)
        else:
            if long:
                room = self.in_flight[head].room
                length = (room + 1 if long["len"] is None else long["len"]) & _LEN
                long.did(f"{head:#x}: length {length:#x}, for which it has room for {room:#x}")
            if short:
                short.did(f"{head:#x}: length {short['len']:#x} instead of {length:#x}")
                length = short["len"] & _LEN
            elements = [self._true(head, length)]
            if twice:
                twice.did(f"{head:#x} is given back twice")
                elements.append(elements[0]._replace(extra=True))
        return elements + self._take_held("used-out-of-order")

    def _instead(self, name: str, hit: Hit, head: int, length: int, others: list[int]) -> list[UsedElement]:
        """What the driver is told instead of the truth."""
        if name == "used-never":
            hit.did(f"{head:#x} is not given back")
            return []
        if name == "used-id-of-another":
            other = others[hit.draw(len(others))]
            hit.did(f"{head:#x} is given back as {other:#x}")
            chain = self._given_back[other] = self.in_flight[other]
            return [UsedElement(other, other, length, self._slots(chain))]
        if name == "used-id-not-in-flight":
            wrong = self._unused_id(hit)
        else:
            wrong = self.size + hit.draw(1000) if hit["id"] is None else hit["id"]
        hit.did(f"{head:#x} is given back as {wrong:#x}")
        return [self._true(head, length)._replace(head=None, id=wrong)]

    def _others(self, head: int) -> list[int]:
        """Buffers that the device has, and has not completed, and of which the driver knows that.

        One that it was told of too early is not named again: each of its two completions gives one buffer back.
        """
        done = self._given_back
        return [e for e, chain in self.in_flight.items() if e != head and chain.ring is self and e not in done]

    def _unused_id(self, hit: Hit) -> int:
        taken = self.in_flight
        free = [each for each in range(self.size) if each not in taken]
        return free[hit.draw(len(free))] if free else self.size - 1

    # ---- buffers that are given back later -----------------------------------------------------------------------

    def _keep_back(self, name: str, hit: Hit, head: int, length: int) -> list[UsedElement]:
        """What is given back now, where that cannot wait, or as many are there as were waited for."""
        if name == "used-late":
            hit.did(f"{head:#x} is given back {hit['time']:g} s later")
            return [] if self.later(hit["time"], partial(self._give, [head, length])) else [self._true(head, length)]
        hit.did(f"{head:#x} is kept back")
        held = self._held[name]
        held += head, length
        waits = len(held) > 2 or self.later(hit["time"], partial(self._release, name))
        if not waits or (name == "used-storm" and len(held) >= 2 * hit["size"]):
            return self._take_held(name)
        return []

    def _take_held(self, name: str) -> list[UsedElement]:
        held, self._held[name] = self._held[name], []
        return [self._true(head, length) for head, length in zip(held[::2], held[1::2], strict=True)]

    def _release(self, name: str) -> None:
        held, self._held[name] = self._held[name], []
        self._give(held)

    def _give(self, pairs: list[int]) -> None:
        """These are shown now, as they are."""
        if pairs and not self._dead:
            self._honest.update(pairs[::2])
            self._ready().extend(pairs)
            self.seams.republish()

    # ---- what the driver has -------------------------------------------------------------------------------------

    def _give_back(self, head: int, current: Chain | None) -> None:
        """The driver has this buffer back; ``current`` is the chain in flight with that head, and will not be any more.

        Where it was told so too early, one of two completions is still to come.
        """
        if head in self._given_back:
            if current is None:
                del self._given_back[head]
            else:
                self._given_back[head] = current
