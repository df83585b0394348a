"""A virtqueue as a device uses it: chains by ``async for``, whatever carries them (virtio 1.4, 2.6).

::

    driver's kick ──▶ kick() ──▶ wakes ──▶ __anext__ ──▶ SplitRing.pop ──▶ chain ──▶ device
    interrupt ◀── on_used() ◀── SplitRing.publish ◀── one for a burst ◀── chain.complete() ◀──┘

Iteration looks at the ring first and waits for a kick only when it is empty. Between the client's leaving and the next
kick, without bus mastering, or while RAM is being remapped under the ring, it waits; it ends only when `Device.run` is
cancelled.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter

import trio

from vfiouser_virtio.errors import GuestError, PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.protocols.virtio.ring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    USED_ALIGN,
    avail_size,
    desc_size,
    used_size,
)
from vfiouser_virtio.virtio.pins import Pinned, Pins
from vfiouser_virtio.vring import Chain, Shadow, SplitRing

# Chains taken from the ring at once: enough to spread the cost of a look, few enough to be fair to other queues.
BURST = 64
# A device that never has to wait still lets others run this often, in seconds. A checkpoint costs some 4 µs.
TIME_SLICE = 0.001

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Queue:
    """One virtqueue: the registers that a transport sets, and the ring behind them once it is enabled.

    ``max_size`` is what the device offers: a power of two, at most 32768. A transport owns all attributes but these:
    a device iterates (or awaits ``anext(queue)``), and may use `index`, `size` and `pinned`.
    """

    def __init__(self, index: int, max_size: int) -> None:
        if not 0 < max_size <= 32768 or max_size & (max_size - 1):
            raise ValueError(f"queue {index}: max_size {max_size} is no power of two from 1 to 32768")
        self.index = index
        self.max_size = max_size
        self.size = max_size
        self.desc = self.driver = self.device = 0
        """Guest addresses of descriptor table, available ring and used ring."""
        self.enabled = False
        self.memory: GuestMemory | None = None
        self.features: tuple[bool, bool] = False, False  # INDIRECT_DESC, EVENT_IDX
        self.on_used: Callable[[], None] = _nothing
        self.on_error: Callable[[Exception], None] = _nothing_with
        self.spawn: Spawn | None = None
        self._paused: set[str] = {"DRIVER_OK"}
        self._ring: SplitRing | None = None
        self._shadow: Shadow | None = None
        self._by_message = False
        self._bound_generation = -1
        self._burst: deque[Chain] = deque()
        self._wakes = 0
        self._waiters = trio.lowlevel.ParkingLot()
        self._slice_end = 0.0
        self._publish_scheduled = False
        self._flushing: SplitRing | None = None
        self._unsent: list[tuple[int, bytes]] = []  # (offset, bytes) of the used ring that the driver does not have yet
        self.pins = Pins()

    def __repr__(self) -> str:
        return f"<Queue {self.index} size {self.size}{' enabled' if self.enabled else ''}>"

    # ---- for devices ---------------------------------------------------------------------------------------------

    def __aiter__(self) -> "Queue":
        return self

    async def __anext__(self) -> Chain:
        """The next chain; waits until there is one. Raises GuestError when the driver has broken the ring."""
        while True:
            while not self._burst:
                seen = self._wakes
                if not await self._look() and seen == self._wakes:
                    await self._waiters.park()
                    self._slice_end = perf_counter() + TIME_SLICE
            if self._burst[0].is_away():
                await self._waiters.park()  # until the map changes again: RAM is being remapped
                continue
            if perf_counter() < self._slice_end:
                return self._burst.popleft()
            self._publish()
            await trio.lowlevel.checkpoint()
            self._slice_end = perf_counter() + TIME_SLICE

    def pinned(self, chain: Chain) -> "Pinned":
        """A context in which the chain's buffers stay mapped while the device awaits, so that the kernel may use them.

        When the client unmaps that memory and will not wait any longer, or the driver resets the device, the block is
        cancelled: ``pinned.revoked`` is True afterwards, and the request must fail.
        """
        assert self.memory is not None
        return Pinned(self.pins, self.memory, chain.ranges)

    # ---- for transports ------------------------------------------------------------------------------------------

    def kick(self) -> None:
        """The driver's available buffer notification. One too many does no harm (AN2)."""
        if self._paused:
            self._paused.discard("client left")
        self._wake()

    def enable(self) -> None:
        """``queue_enable`` = 1. Raises GuestError for rings that are not aligned (2.7), or not in guest memory."""
        for what, address, align in (
            ("desc", self.desc, DESC_ALIGN),
            ("driver", self.driver, AVAIL_ALIGN),
            ("device", self.device, USED_ALIGN),
        ):
            if address % align:
                raise GuestError(f"queue {self.index}: queue_{what} {address:#x} is not aligned to {align} bytes")
        assert self.memory is not None
        for (address, length), write in zip(self._areas(), (False, False, True), strict=True):
            self.memory.check(address, length, write=write)
        self.enabled = True
        self._wake()

    def pause(self, reason: str) -> None:
        """Take no more chains until `resume` with the same reason. Chains in flight are not touched."""
        self._paused.add(reason)

    def resume(self, reason: str) -> None:
        """Undo `pause`."""
        self._paused.discard(reason)
        self._wake()

    def memory_changed(self) -> None:
        """The memory map is another one: chains in flight look again before they touch their buffers."""
        if self._ring is not None:
            for chain in self._ring.in_flight.values():
                chain.stale = True
        self._wake()

    def reset(self) -> None:
        """Back to power-on state (2.6.1). Whoever still holds a chain finds that completing it has no effect."""
        if self._ring is not None:
            self._ring.kill()
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        self.enabled = False
        self._ring = None
        if self._shadow is not None:
            self._shadow.drop()
        self._by_message = False
        self._bound_generation = -1
        self._burst.clear()
        self._unsent.clear()
        self.pins.cancel()

    # ---- the ring ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._wakes += 1  # for a look that is awaiting messages: what it saw may be old
        self._publish()  # what could not be shown before; a device that needs no more chains does not look at the ring
        if self._waiters:
            self._waiters.unpark_all()

    def _ready(self) -> bool:
        """Whether the ring may be looked at now; binds it again after a change of the memory map."""
        if self._paused or not self.enabled or self.memory is None:
            return False
        if self._bound_generation == self.memory.generation:
            return True
        ring = self._ring
        if ring is None:
            indirect, event_idx = self.features
            ring = self._ring = SplitRing(self.size, self.memory, indirect=indirect, event_idx=event_idx)
            ring.on_push = self._pushed
            self._shadow = Shadow(self.memory)
        areas = self._areas()
        try:
            views = [self._area(*area, write=index == 2) for index, area in enumerate(areas)]
        except Unmapped:
            return False  # RAM is being remapped (SeaBIOS: 25 times in a boot); on_change wakes us
        self._by_message = None in views
        if self._by_message:
            # The used ring starts as the driver sees it: indexes where we left them.
            views = [memoryview(bytearray(length)) for _, length in areas]
        ring.bind(*(view for view in views if view is not None))
        self._bound_generation = self.memory.generation
        return True

    def _areas(self) -> list[tuple[int, int]]:
        """(address, length) of descriptor table, available ring and used ring."""
        size = self.size
        return [(self.desc, desc_size(size)), (self.driver, avail_size(size)), (self.device, used_size(size))]

    def _area(self, address: int, length: int, *, write: bool) -> memoryview | None:
        assert self.memory is not None
        try:
            views = (self.memory.writable if write else self.memory.readable)(address, length)
        except NeedsMessages:
            return None
        # Parts that cross from one window into another are reached like memory without a file descriptor.
        return views[0] if len(views) == 1 else None

    async def _look(self) -> bool:
        """Fill the burst from the ring; False when the driver must be waited for, and has been asked to notify."""
        self._publish()
        if not self._ready():
            return False
        if self._by_message:
            return await self._look_by_message()
        ring = self._ring
        assert ring is not None
        try:
            while True:
                chains = ring.pop(BURST)
                if chains:
                    ring.suppress_notifications()
                    self._burst.extend(chains)
                    return True
                if not ring.request_notification():
                    return False
        except NeedsMessages:
            return await self._look_by_message()

    def _pushed(self) -> None:
        """A chain of ours was completed: show it now if nothing else is at hand, else with the others of its burst."""
        if self._by_message or not self._burst:
            self._publish()
        elif not self._publish_scheduled:
            # The device may await between two chains of a burst; this still runs at the end of the scheduler's round.
            self._publish_scheduled = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._publish_later)

    def _publish_later(self) -> None:
        self._publish_scheduled = False
        self._publish()

    def _publish(self) -> None:
        ring, shadow = self._ring, self._shadow
        if ring is None or self._flushing is ring or not (ring.unpublished or self._unsent):
            return
        try:
            # A ring whose memory is away at the moment shows its used entries when it is back: `_wake` comes again.
            if not self._ready():
                return
            # Only now is it known what memory the ring is in.
            if self._by_message or self._unsent or (shadow is not None and shadow.has_claims):
                if self.spawn is not None:
                    self._flushing = ring
                    self.spawn(lambda: self._flush_by_message(ring))
            elif ring.publish():
                self.on_used()
        except GuestError as error:
            self.on_error(error)

    # ---- memory without a file descriptor ------------------------------------------------------------------------

    async def _look_by_message(self) -> bool:
        ring, shadow, memory = self._ring, self._shadow, self.memory
        assert ring is not None
        assert shadow is not None
        assert memory is not None
        try:
            if self._by_message and not await self._fetch_rings(ring, memory):
                return False
            ring.memory = shadow
            shadow.begin()
            while ring is self._ring and ring.has_available() and len(self._burst) < BURST and not self._paused:
                try:
                    chains = ring.pop(1)
                except NeedsMessages as missing:
                    await shadow.fetch(missing)
                    continue
                shadow.claim(chains[0].head)
                self._burst.extend(chains)
        except (PeerError, Unmapped) as error:
            # The client refused, or the memory has gone (RAM is being remapped), or the client: wait what comes next.
            if ring is self._ring and memory.client is not None and memory.generation == self._bound_generation:
                raise GuestError(f"queue {self.index}: {error}") from error
            return False
        finally:
            ring.memory = memory
        return bool(self._burst)

    async def _fetch_rings(self, ring: SplitRing, memory: GuestMemory) -> bool:
        """Copy the driver's side of the rings here; False when it has nothing new and will notify us."""
        desc, avail, used = self._areas()
        asked = False
        while True:
            available = await memory.read(*avail)
            if ring is not self._ring:
                return False
            ring.avail_bytes[:] = available
            if ring.has_available():
                break
            if asked:
                return False
            ring.request_notification()
            offset, length = ring.notification_word
            await memory.write(used[0] + offset, bytes(ring.used_bytes[offset : offset + length]))
            asked = True
        descriptors = await memory.read(*desc)
        if ring is not self._ring or self._bound_generation != memory.generation:
            return False
        ring.desc_bytes[:] = descriptors
        return True

    async def _flush_by_message(self, ring: SplitRing) -> None:
        try:
            await self._flush(ring)
        finally:
            if self._flushing is ring:  # after a reset of the queue there may be another flush, of another ring
                self._flushing = None
        self._publish()  # what was completed meanwhile, or could not be sent while its memory was away

    async def _flush(self, ring: SplitRing) -> None:
        shadow, memory = self._shadow, self.memory
        assert shadow is not None
        assert memory is not None
        delivered = False
        try:
            while ring is self._ring and (ring.unpublished or self._unsent):
                delivered = False
                chains = ring.unpublished_chains
                for chain in chains:
                    await shadow.write_back(chain)
                delivered = True
                if ring is not self._ring or not self._ready():
                    return
                self._unsent += [
                    (offset, bytes(ring.used_bytes[offset:][:size])) for offset, size in ring.store_used(len(chains))
                ]
                while self._unsent:
                    await self._send_used(ring, memory, *self._unsent[0])
                    if ring is not self._ring:
                        return
                    del self._unsent[0]
                if self._by_message:
                    offset, size = ring.interrupt_word
                    try:
                        ring.avail_bytes[offset : offset + size] = await memory.read(self.driver + offset, size)
                    except (PeerError, Unmapped):
                        pass  # its memory is away already: what it wished before stands
                if ring is self._ring and ring.interrupt_due():
                    self.on_used()
        except (PeerError, Unmapped) as error:
            # What could not be put into the buffers is lost, but a used ring that is being remapped comes back.
            lost = not delivered or memory.generation == self._bound_generation
            if ring is self._ring and memory.client is not None and lost:
                self.on_error(GuestError(f"queue {self.index}: {error}"))

    async def _send_used(self, ring: SplitRing, memory: GuestMemory, offset: int, data: bytes) -> None:
        if self._by_message:
            await memory.write(self.device + offset, data)
        else:  # it has come back with a file descriptor
            ring.used_bytes[offset : offset + len(data)] = data


def _nothing() -> None:
    pass


def _nothing_with(_: Exception) -> None:
    pass
