"""A virtqueue as a device uses it: chains by ``async for``, whatever carries them (virtio 1.4, 2.6).

::

    driver's kick ──▶ kick() ──▶ wakes ──▶ __anext__ ──▶ Ring.pop ──▶ chain ──▶ device
    interrupt ◀── on_used() ◀── Ring.publish ◀── one for a burst ◀── chain.complete() ◀──┘

Iteration looks at the ring first and waits for a kick only when it is empty, perhaps after some `polling`. Between the
client's leaving and the next kick, without bus mastering, or while RAM is being remapped under the ring, it waits; it
ends only when `Device.run` is cancelled.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter

import trio

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio import queue_messages
from vfiouser_virtio.virtio.bound_ring import BoundRing
from vfiouser_virtio.virtio.pins import Pinned, Pins
from vfiouser_virtio.virtio.polling import Polling
from vfiouser_virtio.virtio.queue_registers import QueueRegisters
from vfiouser_virtio.vring import Chain, make_ring

# Chains taken from the ring at once: enough to spread the cost of a look, few enough to be fair to other queues.
BURST = 64
MISSED = 1.0
"""Seconds that a ring's memory may be away before that is said."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Queue(QueueRegisters):
    """One virtqueue: the registers that a transport sets, and the ring behind them once it is enabled.

    A transport owns all attributes but these: a device iterates (or awaits ``anext(queue)``), and may use `index`,
    `size`, `pinned` and `hold`.
    """

    def __init__(self, index: int, max_size: int) -> None:
        super().__init__(index, max_size)
        self.memory: GuestMemory | None = None
        self.on_used: Callable[[], None] = _nothing
        self.on_error: Callable[[Exception], None] = _nothing_with
        self.spawn: Spawn | None = None
        self.on_park: Callable[[], None] | None = None
        """Called when a task starts to wait for this queue."""
        self.pins = Pins()
        self.polling = Polling()
        self.tell: Callable[[str], None] = _nothing_with
        """For what a user should know of: one line."""
        self.notified = False
        """The driver has sent a notification since the last reset."""
        self._paused: set[str] = {"DRIVER_OK"}
        self._draining = False
        self._asked = False
        """The driver has notified the device since the ring was last within reach."""
        self._bound: BoundRing | None = None
        self._burst: deque[Chain] = deque()
        self._wakes = 0
        self._waiters: list[trio.lowlevel.Task] = []
        self._slice_end, self._round = 0.0, 0
        self._publish_scheduled = False

    # ---- for devices ---------------------------------------------------------------------------------------------

    def __aiter__(self) -> "Queue":
        return self

    async def __anext__(self) -> Chain:
        """The next chain; waits until there is one. Raises GuestError when the driver has broken the ring."""
        while True:
            if not self._burst:
                await self._wait_available()
            elif perf_counter() >= self._slice_end:
                self._publish()
                self._slice_end = await turns().wait()
            elif self._paused or self._draining or self._burst[0].is_away():
                await self._park()  # until there is a reason to look again
            else:
                return self._burst.popleft()

    def pinned(self, chain: Chain) -> "Pinned":
        """A context in which the chain's buffers stay mapped while the device awaits, so that the kernel may use them.

        When the client unmaps that memory and will not wait any longer, or the driver resets the device, the block is
        cancelled: ``pinned.revoked`` is True afterwards, and the request must fail.
        """
        assert self.memory is not None
        return Pinned(self.pins, self.memory, lambda: chain.ranges)

    def hold(self, chain: Chain, cancel: Callable[[], None]) -> Callable[[], None]:
        """As `pinned`, for work that is no task of its own: the buffers stay mapped until what is returned is called.

        ``cancel`` is called where `pinned` would cancel its block: the request must end soon, and fail.
        """
        assert self.memory is not None
        return partial(self.pins.remove, self.pins.add(self.memory, lambda: chain.ranges, cancel))

    # ---- for transports ------------------------------------------------------------------------------------------

    def may_be_next(self, next_available: int) -> bool:
        """Whether a notification can say this of where the driver goes on: next_off and next_wrap, 16 bits (2.9)."""
        return self._bound is None or self._bound.ring.may_be_next(next_available)

    def kick(self) -> None:
        """The driver's available buffer notification. One too many does no harm (AN2)."""
        if self._paused:
            self._paused.discard("client left")
        self.notified = self._asked = True
        self._wake()

    @property
    def overlooked(self) -> bool:
        """Whether a buffer is available to a device that waits for a notification; False where that takes messages."""
        bound = self._usable() if self._waiters and not self._draining else None
        return bound is not None and not bound.by_message and bound.ring.offers_buffer()

    def peek(self, by_message: bool) -> bool:
        """Wake whoever waits if there is something new, as a kick does; False where that cannot be known.

        What takes messages is only looked at where ``by_message`` says so, and then by whoever waits.
        """
        bound = self._usable()
        if bound is None:
            return False
        if self._waiters and (by_message if bound.by_message else bound.ring.has_available()):
            self._wake()
        return True

    def enable(self) -> None:
        """``queue_enable`` = 1. Raises GuestError for rings that are not aligned (2.7), or not in guest memory."""
        assert self.memory is not None
        areas = self.areas()
        for area in areas:
            self.memory.check(area.address, area.length, write=area.write)
        ring = make_ring(self.size, self.memory, self.features)
        ring.on_push = self._pushed
        self._bound = BoundRing(f"queue {self.index}", ring, self.memory, areas)
        self.enabled = True
        self._wake()

    def pause(self, reason: str) -> None:
        """Hand out no more chains, and do not touch the ring, until `resume` with the same reason."""
        self._paused.add(reason)

    def resume(self, reason: str) -> None:
        """Undo `pause`."""
        self._paused.discard(reason)
        self._wake()

    def drain(self, on: bool = True) -> None:
        """Hand out no more chains, but go on with those that the device has; ``on`` False ends that."""
        self._draining = on
        self._wake()

    @property
    def at_work(self) -> bool:
        """Whether guest memory is being used: by requests that are pinned, or by messages to and from the ring."""
        bound = self._bound
        return self.pins.busy or (bound is not None and (bound.fetching or bound.flushing))

    @property
    def in_hand(self) -> int:
        """Chains that the device was given, and that the driver does not have back."""
        bound = self._bound
        if bound is None:
            return 0
        return len(bound.ring.in_flight) - len(self._burst) + bound.ring.unpublished + len(bound.unsent)

    def chains_in_hand(self) -> list[Chain]:
        """The chains that the device was given and has not completed."""
        bound = self._bound
        if bound is None:
            return []
        waiting = {chain.head for chain in self._burst}
        return [chain for chain in bound.ring.in_flight.values() if chain.ring and chain.head not in waiting]

    @property
    def waiters(self) -> list[trio.lowlevel.Task]:
        """The tasks that wait for this queue."""
        return self._waiters

    def memory_changed(self) -> None:
        """The memory map is another one: chains in flight look again before they touch their buffers."""
        bound = self._bound
        if bound is None:
            return
        bound.ring.memory_changed()
        # A ring that nobody has missed is bound to its new place when it is next looked at.
        if bound.away or bound.fetching or bound.has_news or self._burst:
            self._wake()

    def reset(self) -> None:
        """Back to power-on state (2.6.1). Whoever still holds a chain finds that completing it has no effect."""
        if self._bound is not None:
            self._bound.kill()
            self._bound = None
        self.clear()
        self.notified = False
        self._burst.clear()
        self.pins.cancel()

    # ---- looking at the ring -------------------------------------------------------------------------------------

    async def _wait_available(self) -> None:
        """Look, and park until the next wake-up while there is nothing."""
        while not self._burst:
            seen = self._wakes
            if not await self._look() and seen == self._wakes:
                await self._park()
                self._slice_end, self._round = turns().woken(self._round)

    async def _look(self) -> bool:
        """Fill the burst from the ring; False when the driver must be waited for, and has been asked to notify."""
        self._publish()
        if not self._has_news() and self.polling.promising():
            await self.polling.spin(self._has_news)
            self._slice_end, self._round = turns().woken(self._round)
        bound = self._usable()
        if bound is None or self._draining:
            return False
        if not bound.by_message:
            ring = bound.ring
            try:
                while True:
                    chains = ring.pop(BURST)
                    if chains:
                        self.polling.filled()
                        ring.suppress_notifications()
                        self._burst.extend(chains)
                        return True
                    if self.polling.always:
                        ring.suppress_notifications()
                        return False
                    if not ring.request_notification():
                        return False
            except NeedsMessages:
                pass  # for a buffer
        await queue_messages.take(bound, self._burst, BURST, lambda: not (self._paused or self._draining))
        return bool(self._burst)

    def _has_news(self) -> bool:
        """Whether there is nothing to wait for: something is available, or cannot be seen without more work."""
        bound = self._usable()
        return bound is None or self._draining or bound.by_message or bound.ring.has_available()

    def _usable(self) -> BoundRing | None:
        """The ring if it may be touched now; bound again after a change of the memory map."""
        bound = self._bound
        if bound is None or self._paused:
            return None
        if bound.bind():
            self._asked = False
            return bound
        # Firmware leaves queues behind that nobody waits for: Linux may unmap their memory long before it resets them.
        if (self._asked or bound.has_news) and not bound.missed and self.spawn is not None:
            bound.missed = True
            self.spawn(lambda: self._tell_missed(bound))
        return None

    async def _tell_missed(self, bound: BoundRing) -> None:
        """QEMU's remapping of RAM takes the ring's memory away for some milliseconds; what lasts is worth a line."""
        await trio.sleep(MISSED)
        bound.missed = False
        if bound.alive() and not self._paused and not bound.bind():
            bound.missed = True  # said once, until a reset
            self.tell(
                f"queue {self.index} waits for its ring's memory, which its client has unmapped or mapped read-only "
                f"({bound.lacks}): until it is mapped again, or the driver resets the device, no request is served"
            )

    async def _park(self) -> None:
        """Wait for `_wake`. A ParkingLot does the same, but costs 2 µs more to leave, and every kick pays that."""
        if self.on_park is not None:
            self.on_park()
        task = trio.lowlevel.current_task()
        self._waiters.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiters.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        self._wakes += 1  # for a look that is awaiting messages: what it saw may be old
        self._publish()  # what could not be shown before; a device that needs no more chains does not look at the ring
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for task in waiters:
                trio.lowlevel.reschedule(task)

    # ---- showing what was used -----------------------------------------------------------------------------------

    def _pushed(self) -> None:
        """A chain of ours was completed: show it now if nothing else is at hand, else with the others of its burst."""
        if not self._burst or (self._bound is not None and self._bound.by_message):
            self._publish()
        elif not self._publish_scheduled:
            # The device may await between two chains of a burst; this still runs at the end of the scheduler's round.
            self._publish_scheduled = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._publish_later)

    def _publish_later(self) -> None:
        self._publish_scheduled = False
        self._publish()

    def _publish(self) -> None:
        bound = self._bound
        if bound is None or bound.flushing or not bound.has_news:
            return
        try:
            # A ring whose memory is away at the moment shows its used entries when it is back: `_wake` comes again.
            if self._usable() is None:
                return
            if bound.needs_messages:
                if self.spawn is not None:
                    bound.flushing = True
                    self.spawn(lambda: self._flush(bound))
            elif bound.ring.publish():
                self.on_used()
        except Exception as error:  # anything but a GuestError is a bug, but the caller may be the scheduler
            self.on_error(error)

    async def _flush(self, bound: BoundRing) -> None:
        try:
            await queue_messages.flush(bound, lambda: self._usable() is not None, self.on_used)
        except GuestError as error:
            self.on_error(error)
        finally:
            bound.flushing = False
        self._publish()  # what was completed meanwhile, or could not be sent while its memory was away
        if bound.lacks_room:
            bound.lacks_room = False
            self._wake()


def _nothing() -> None:
    pass


def _nothing_with(_: object) -> None:
    pass
