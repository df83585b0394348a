"""Virtqueue, device side (virtio 1.4, 2.6): registers, ring, notifications, and what was used.

::

    driver's kick ──▶ kick() ──▶ wakes ──▶ Queue.__anext__ ──▶ Ring.pop ──▶ chain ──▶ device
    interrupt ◀── interrupt() ◀── Ring.publish ◀── one for a burst ◀── chain.complete() ◀──┘

A look at the ring comes first, and the wait for a kick only when it is empty, perhaps after some `polling`. While there
is a reason to stand still (`Stop`), or RAM is being remapped under the ring, nothing is handed out.

A long file, since all of it is about the same burst and the same ring; what stands apart has rooms of its own.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from typing import ClassVar

import trio

from vfiouser_virtio.errors import AuthorError, GuestError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio import remote
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.virtio.coalescing import RESOLUTION, Coalescing
from vfiouser_virtio.virtio.offer import Poll
from vfiouser_virtio.virtio.pins import Pins
from vfiouser_virtio.virtio.polling import Polling
from vfiouser_virtio.virtio.queue_registers import QueueRegisters
from vfiouser_virtio.virtio.stop import UNTOUCHABLE, Stop
from vfiouser_virtio.virtio.virtqueue_state import VirtqueueState
from vfiouser_virtio.vring import Area, Chain, CopyRoom, PackedRing, SplitRing

# Chains taken from the ring at once: enough to spread the cost of a look, few enough to be fair to other queues.
BURST = 64
MISSED = 1.0
"""Seconds that a ring's memory may be unmapped before that is logged."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]

# Plain ints: what is looked at for each chain is worth more than the tenth of a microsecond that a Flag takes.
_UNTOUCHABLE = UNTOUCHABLE.value
_KICKED = ~Stop.UNTIL_KICK.value


class Virtqueue(QueueRegisters):
    """Virtqueue of a device: the registers that a driver sets, and the ring behind them once it is enabled.

    ``interrupt`` sends a used buffer notification, ``failed`` is told of what the driver or the device has done wrong,
    ``warn`` of what a user should know: one line. ``room`` is that of the device's copies of memory that is not mapped.
    """

    split_ring: ClassVar[type[SplitRing]] = SplitRing
    packed_ring: ClassVar[type[PackedRing]] = PackedRing
    """What is behind it, as negotiated."""

    # What few queues have is no attribute of all: of more than 30, CPython 3.11 looks each up in a slower way.
    coalescing = (0, 0)
    """See `Queue.coalesce`."""
    _coalescing: Coalescing | None = None
    _lasting = (0, 0)

    def __init__(
        self,
        index: int,
        max_size: int,
        memory: GuestMemory,
        *,
        interrupt: Callable[[], None],
        failed: Callable[[Exception], None],
        warn: Callable[[str], None],
        poll: Poll = "off",
        room: CopyRoom | None = None,
    ) -> None:
        super().__init__(index, max_size)
        self.memory = memory
        self.pins = Pins()
        self.burst: deque[Chain] = deque()
        """Chains that were taken from the ring, and not handed out yet."""
        self.slice_end = 0.0
        """Until when (``perf_counter``) chains may be handed out without waiting: then others have their turn."""
        self.stopped = Stop.NOT_DRIVER_OK.value
        """The reasons to hand out nothing: the value of a `Stop`; 0 for none."""
        self.notified = False
        """The driver has sent a notification since the last reset."""
        self.counts = [0, 0]
        """Notifications of the driver, and interrupts, since `forget_counts`."""
        self.polling = Polling(poll)
        self.waiters: list[trio.lowlevel.Task] = []
        """The tasks that wait for this queue."""
        self._interrupt = interrupt
        self._failed = failed
        self._warn = warn
        self._room = room or CopyRoom()
        self._poll: Poll = poll
        self._spawn: Spawn | None = None
        self._on_park: Callable[[], None] | None = None
        self._asked = False
        """The driver has notified the device since the ring was last within reach."""
        self._bound: BoundRing | None = None
        self._wakes = self._round = 0
        self._publish_scheduled = False

    # ---- the device's run ----------------------------------------------------------------------------------------

    def begin_run(self, spawn: Spawn) -> None:
        """The device runs: ``spawn`` starts tasks that end with that run."""
        self._spawn = spawn
        if self._coalescing is not None:
            self._coalescing.resume(spawn)

    def end_run(self) -> None:
        """The run has ended, and with it all that was spawned."""
        self._spawn = self.pins.reap = None
        if self._coalescing is not None:
            self._coalescing.end()
        self.polling = Polling(self._poll)

    def poll_always(self) -> None:
        """Look without being notified, until the device's run ends."""
        self.polling = Polling("on")

    def call_on_park(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever a task starts to wait for this queue; None: do not."""
        self._on_park = callback

    # ---- registers, status, and what else a transport says -------------------------------------------------------

    def may_be_next(self, next_available: int) -> bool:
        """Whether a notification can say this of where the driver goes on: next_off and next_wrap, 16 bits (2.9)."""
        return self._bound is None or self._bound.ring.may_be_next(next_available)

    def kick(self) -> None:
        """The driver's available buffer notification. One too many does no harm (AN2)."""
        if self.stopped:
            self.stopped &= _KICKED
        self.notified = self._asked = True
        self.counts[0] += 1
        self._wake()

    @property
    def overlooked(self) -> bool:
        """Whether a buffer is available to a device that waits for a notification; False where that takes messages."""
        bound = self._usable() if self.waiters and not self.stopped else None
        return bound is not None and not bound.by_message and bound.ring.offers_buffer()

    def peek(self, by_message: bool) -> bool:
        """Wake the waiting tasks if there is something new, as a kick does; False where that cannot be known.

        What takes messages is only looked at where ``by_message`` says so, and then by a waiting task.
        """
        bound = self._usable()
        if bound is None:
            return False
        if self.waiters and (by_message if bound.by_message else bound.ring.again or bound.ring.has_available()):
            self._wake()
        return True

    def enable(self) -> None:
        """``queue_enable`` = 1. Raises GuestError for rings that are not aligned (2.7), or not in guest memory."""
        areas = self.areas()
        for area in areas:
            self.memory.check(area.address, area.length, write=area.write)
        self._bound = self._new_ring(areas)
        self.enabled = True
        if self.coalescing != (0, 0):
            self.coalesce(*self.coalescing, until_reset=True)  # with this size
        self._wake()

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        ring_class = self.packed_ring if self.features.packed else self.split_ring
        ring = ring_class(self.size, self.memory, self.features)
        ring.on_push = self._pushed
        return BoundRing(f"queue {self.index}", ring, self.memory, areas, self._room, self._wake)

    def stop(self, reason: Stop) -> None:
        """Hand out no more chains until `start` with the same reason."""
        self.stopped |= reason.value

    def start(self, reason: Stop) -> None:
        """Undo `stop`."""
        self.stopped &= ~reason.value
        self._wake()

    @property
    def at_work(self) -> bool:
        """Whether guest memory is being used: by requests that are pinned, or by messages to and from the ring."""
        bound = self._bound
        return self.pins.busy or (bound is not None and (bound.fetching or bound.flushing))

    @property
    def outstanding(self) -> int:
        """Chains that the device was given, and that the driver does not have back."""
        bound = self._bound
        if bound is None:
            return 0
        ring = bound.ring
        return len(ring.in_flight) - len(self.burst) - len(ring.again) + bound.ring.unpublished + len(bound.unsent)

    def uncompleted_chains(self) -> list[Chain]:
        """The chains that the device was given and has not completed."""
        bound = self._bound
        if bound is None:
            return []
        waiting = {*bound.ring.again, *(chain.head for chain in self.burst)}
        return [chain for chain in bound.ring.in_flight.values() if chain.ring and chain.head not in waiting]

    def memory_changed(self) -> None:
        """The memory map is another one: chains in flight look again before they touch their buffers."""
        bound = self._bound
        if bound is None:
            return
        bound.ring.memory_changed()
        # Otherwise a ring is bound to its new place at the next look.
        if bound.unmapped or bound.fetching or bound.has_unpublished or self.burst or bound.ring.again:
            self._wake()

    def reset(self) -> None:
        """Back to power-on state (2.6.1). To complete a chain of before has no effect."""
        if self._bound is not None:
            self._bound.kill()
            self._bound = None
            if self._spawn is not None:
                self._spawn(self._say_freed)  # to other queues, where it is this one alone that is reset
        self.clear()
        self.notified = False
        self.burst.clear()
        self.pins.cancel()
        if self.coalescing != self._lasting or self._coalescing is not None:
            self.coalesce(*self._lasting)

    async def _say_freed(self) -> None:
        self._room.freed()

    # ---- going on with another device, or elsewhere --------------------------------------------------------------

    def put_back(self, chain: Chain) -> None:
        """See `Queue.put_back`."""
        if chain.ring is None:
            raise AuthorError(f"chain {chain.head:#x} was completed, and cannot be put back")
        bound = self._bound
        if bound is not None and chain.ring is bound.ring:
            self._offer_again(bound, [chain, *self.burst])
        # Else the queue was reset meanwhile, or has another device.

    def offer_again(self) -> None:
        """Hand out anew the chains that were not completed: they are not those of the device that had them any more.

        Nothing may be using their buffers: see `at_work`.
        """
        if self._bound is not None:
            self._offer_again(self._bound, None)

    def _offer_again(self, bound: BoundRing, chains: list[Chain] | None) -> None:
        bound.shadow.forget(bound.ring.offer_again(chains))
        self.burst.clear()
        self._wake()

    def state(self) -> VirtqueueState:
        """What has to be kept of the queue, beside guest memory. Changes nothing.

        Buffers that the device has, or that it has completed but whose contents are still to be sent by messages, are
        offered again after `restore`, so that what was done for them is done twice.
        """
        bound = self._bound
        return VirtqueueState(
            size=self.size,
            desc=self.desc,
            driver=self.driver,
            device=self.device,
            enabled=self.enabled,
            features=self.features,
            notified=self.notified,
            ring=None if bound is None else bound.ring.state(bound.shadow.claims),
            unsent=() if bound is None else tuple(bound.unsent),
        )

    def restore(self, state: VirtqueueState) -> None:
        """Go on where another queue was: instead of all that a driver does until the queue is enabled.

        Guest memory need not be mapped yet. Raises ValueError for a state that no queue of this size can have, and
        GuestError for one that no driver can have made.
        """
        if self.enabled:
            raise ValueError(f"queue {self.index} is in use already")
        self.negotiate(state.features)
        if not self.allows(state.size):
            raise ValueError(f"queue {self.index} cannot have {state.size:#x} entries, but up to {self.max_size:#x}")
        self.configure(size=state.size, desc=state.desc, driver=state.driver, device=state.device)
        self.notified = state.notified
        if state.ring is not None:
            bound = self._new_ring(self.areas())
            bound.ring.restore(state.ring)
            bound.unsent.extend(state.unsent)
            self._bound = bound
        self.enabled = state.enabled
        self._wake()

    # ---- looking at the ring: for `Queue` ------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the first chain of the burst may be handed out now: what `wait_chain` waits for, without an await."""
        burst = self.burst
        if not burst and not self.fill_nowait():
            return False
        return perf_counter() < self.slice_end and not self.stopped and not burst[0].is_unmapped()

    def fill_nowait(self) -> bool:
        """Fill the burst with what can be had without waiting; whether there is any."""
        bound = self._usable()
        if bound is None:
            return False
        if bound.has_unpublished:
            self._publish()
        return not self.stopped and bool(self._fill(bound))

    async def wait_chain(self) -> None:
        """Return when the first chain of the burst may be handed out. For one that is not `ready`."""
        burst = self.burst
        while True:
            seen = self._wakes
            if burst:
                if perf_counter() >= self.slice_end:
                    await self._wait_turn()
                    if burst and not self.stopped and not burst[0].is_unmapped():
                        return  # with no look at the clock: a chain a turn, however slow the machine is
                else:
                    await self.park()  # until there is a reason to look again
            elif self._may_poll() and self.polling.should_spin():
                if await self.polling.spin(
                    self._has_available, self._outstanding, held=self._held, reap=self._reap_ended
                ):
                    self.slice_end, self._round = turns().woken(self._round)
            elif not await self._ask() and seen == self._wakes:
                await self.park()
                self.slice_end, self._round = turns().woken(self._round)
            if self.ready():
                return

    async def wait_chains(self, count: int) -> None:
        """Return when the first ``count`` chains, or more, are in the burst, and may be handed out."""
        while True:
            if not self.ready():
                await self.wait_chain()
            if len(self.burst) >= count:
                return
            seen = self._wakes
            self._publish()
            if not await self._ask(count) and seen == self._wakes:
                await self.park()
                self.slice_end, self._round = turns().woken(self._round)

    def hand_out(self, at_once: bool) -> Iterator[Chain]:
        """The chains of the burst, as long as they may be handed out without waiting.

        ``at_once``: the device does not await until it has asked for the next, or has given up the iterator.
        """
        burst, bound = self.burst, self._bound
        if at_once and bound is not None:
            bound.ring.on_push = None  # to be told of each takes 0.1 µs
        try:
            while burst and not self.stopped:
                if burst[0].stale and burst[0].is_unmapped():
                    return
                yield burst.popleft()
                if perf_counter() >= self.slice_end:
                    return
        finally:
            if at_once and bound is not None and bound.alive():
                bound.ring.on_push = self._pushed
                self._publish()

    async def _wait_turn(self) -> None:
        """The slice of time is over: let others have theirs."""
        self._publish()
        self.slice_end = await turns().wait()

    def _may_poll(self) -> bool:
        """Whether the ring is within reach and empty: with that, each new round of polling has its time to end."""
        bound = self._usable()
        if bound is None or self.stopped or bound.by_message:
            return False
        return not bound.ring.again and not bound.ring.has_available()

    async def _ask(self, wanted: int = 1) -> bool:
        """Ask the driver to notify, and add to the burst what it has sent before; False when it must be waited for.

        Where that takes messages, it is done here.
        """
        before = len(self.burst)
        bound = self._usable()
        if bound is None or self.stopped:
            return False
        filled = self._fill(bound)
        while filled is False and not bound.ring.again:
            if self.polling.always:
                bound.ring.suppress_notifications()
                break
            if not bound.ring.request_notification():
                break
            filled = self._fill(bound)
        if filled is None:
            await remote.take(bound, self.burst, max(BURST, wanted), lambda: not self.stopped)
        return len(self.burst) > before

    def _fill(self, bound: BoundRing) -> bool | None:
        """Fill the burst from a ring that may be touched; False when there is nothing, None where it takes messages."""
        if bound.by_message:
            return None
        ring = bound.ring
        try:
            chains = self._retake(bound) if ring.again else ring.pop(BURST)
        except NeedsMessages:  # for a buffer
            return None
        if not chains:
            return False
        self.polling.filled()
        ring.suppress_notifications()
        self.burst.extend(chains)
        return True

    @staticmethod
    def _retake(bound: BoundRing) -> list[Chain]:
        try:
            return bound.ring.retake(BURST)
        except Unmapped:  # the driver had its buffers in memory once: they wait until that is back
            return []

    def _has_available(self) -> bool:
        """Whether there is nothing to wait for: something is available, or cannot be seen without more work."""
        bound = self._usable()
        if bound is None or self.stopped or bound.by_message:
            return True
        return bound.ring.has_available() or bool(bound.ring.again)

    def _outstanding(self) -> int:
        """How many requests the device has not completed."""
        return 0 if self._bound is None else self._bound.ring.outstanding

    def _held(self) -> int:
        return self.pins.held

    def _reap_ended(self) -> bool:
        """Whether requests have ended that need no task; they are shown to the driver at once, with one interrupt."""
        bound = self._bound
        if self.pins.reap is None or bound is None:
            return False
        bound.ring.on_push = None
        try:
            return self.pins.reap()
        finally:
            if bound.alive():
                bound.ring.on_push = self._pushed
                self._publish()

    def _usable(self) -> BoundRing | None:
        """The ring if it may be touched now; bound again after a change of the memory map."""
        bound = self._bound
        if bound is None or self.stopped & _UNTOUCHABLE:
            return None
        if bound.generation == self.memory.generation or bound.bind():
            self._asked = False
            return bound
        # Firmware leaves queues behind without a waiter: Linux may unmap their memory long before it resets them.
        if (self._asked or bound.has_unpublished) and not bound.missed and self._spawn is not None:
            bound.missed = True
            self._spawn(lambda: self._tell_missed(bound))
        return None

    async def _tell_missed(self, bound: BoundRing) -> None:
        """QEMU's remapping of RAM unmaps the ring for some milliseconds; what lasts is worth a line."""
        await trio.sleep(MISSED)
        bound.missed = False
        if bound.alive() and not self.stopped & _UNTOUCHABLE and not bound.bind():
            bound.missed = True  # said once, until a reset
            self._warn(
                f"queue {self.index} waits for its ring's memory, which its client has unmapped or mapped read-only "
                f"({bound.lacks}): until it is mapped again, or the driver resets the device, no request is served"
            )

    async def park(self) -> None:
        """Wait for `_wake`. A ParkingLot does the same, but costs 2 µs more to leave, and every kick pays that."""
        if self._on_park is not None:
            self._on_park()
        task = trio.lowlevel.current_task()
        self.waiters.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self.waiters.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        self._wakes += 1  # for a look that is awaiting messages: what it saw may be old
        self._publish()  # what could not be shown before; a device that needs no more chains does not look at the ring
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for task in waiters:
                trio.lowlevel.reschedule(task)

    # ---- showing what was used -----------------------------------------------------------------------------------

    def _pushed(self) -> None:
        """A chain of ours was completed: show it now if nothing else is at hand, else with the others of its burst."""
        if not self.burst or (self._bound is not None and self._bound.by_message):
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
        if bound is None or bound.flushing or not bound.has_unpublished:
            return
        try:
            # A ring whose memory is unmapped at the moment shows its used entries when it is back: `_wake` comes again.
            if self._usable() is None:
                return
            if bound.needs_messages:
                if self._spawn is not None:
                    bound.flushing = True
                    self._spawn(lambda: self._flush(bound))
            elif self._coalescing is not None:
                self._coalescing.shown(bound.ring.show(), self._spawn)
            elif bound.ring.publish():
                self.counts[1] += 1
                self._interrupt()
        except Exception as error:  # anything but a GuestError is a bug, but the caller may be the scheduler
            self._failed(error)

    async def _flush(self, bound: BoundRing) -> None:
        try:
            await remote.flush(bound, lambda: self._usable() is not None, self._notify)
        except GuestError as error:
            self._failed(error)
        finally:
            bound.flushing = False
        self._publish()  # what was completed meanwhile, or could not be sent while its memory was unmapped
        self._room.freed()

    # ---- notifications -------------------------------------------------------------------------------------------

    def coalesce(self, max_packets: int, max_usecs: int, *, until_reset: bool = False) -> None:
        """See `Queue.coalesce`."""
        if not until_reset:
            self._lasting = max_packets, max_usecs
        self.coalescing = max_packets, max_usecs
        before, self._coalescing = self._coalescing, None
        if max_packets and max_usecs >= RESOLUTION:
            # A driver whose buffers are all used, and who does not know it, has none for what comes next.
            at_most = max(1, self.size // 2)
            self._coalescing = Coalescing(min(max_packets, at_most), max_usecs / 1e6, self._notify_if_due)
        if before is not None and not before.end():
            self._notify()  # one too many does no harm

    def forget_counts(self) -> None:
        """Count notifications and interrupts from 0 on."""
        self.counts = [0, 0]

    def _notify_if_due(self) -> bool:
        """Interrupt the driver if it wants that for what it was shown; False while its ring is out of reach."""
        bound = self._bound
        if bound is None:
            return True
        try:
            if self._usable() is None:
                return False
            if bound.by_message or bound.ring.interrupt_due():
                self._notify()
        except Exception as error:  # as in `_publish`
            self._failed(error)
        return True

    def _notify(self) -> None:
        self.counts[1] += 1
        self._interrupt()
