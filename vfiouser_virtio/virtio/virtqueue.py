"""Virtqueue, device side (virtio 1.4, 2.6): what is done for each kick, burst of chains, and interrupt.

::

    driver's kick ──▶ kick() ──▶ wakes ──▶ Queue.__anext__ ──▶ Ring.pop ──▶ chain ──▶ device
    interrupt ◀── interrupt() ◀── Ring.publish ◀── one for a burst ◀── chain.complete() ◀──┘

A look at the ring comes first, and the wait for a kick only when it is empty, perhaps after some `polling`. While there
is a reason to stand still (`Stop`), or RAM is being remapped under the ring, nothing is handed out.

What is done with the same object more seldom is in `queue_ring` (set-up, reset, saved state) and `coalescing`. These
are base classes, not parts: what is here would otherwise look up two attributes where it looks up one.
"""

from collections.abc import Callable, Iterator
from time import perf_counter

import trio

from vfiouser_virtio.errors import GuestError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio import remote
from vfiouser_virtio.virtio.binding import BURST, BoundRing
from vfiouser_virtio.virtio.coalescing import CoalescedQueue
from vfiouser_virtio.virtio.offer import Poll
from vfiouser_virtio.virtio.polling import Polling
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.virtio.stop import UNTOUCHABLE, Stop
from vfiouser_virtio.vring import Chain, CopyRoom

# Plain ints: what is looked at for each chain is worth more than the tenth of a microsecond that a Flag takes.
_UNTOUCHABLE = UNTOUCHABLE.value
_KICKED = ~Stop.UNTIL_KICK.value


class Virtqueue(CoalescedQueue):
    """Virtqueue of a device: the registers that a driver sets, and the ring behind them once it is enabled.

    ``interrupt`` sends a used buffer notification, ``failed`` is told of what the driver or the device has done wrong,
    ``warn`` of what a user should know: one line. ``room`` is that of the device's copies of memory that is not mapped.
    """

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
        super().__init__(index, max_size, memory, interrupt=interrupt, failed=failed, warn=warn, room=room)
        self.slice_end = 0.0
        """Until when (``perf_counter``) chains may be handed out without waiting: then others have their turn."""
        self.polling = Polling(poll)
        self.waiters: list[trio.lowlevel.Task] = []
        """The tasks that wait for this queue."""
        self._poll: Poll = poll
        self._on_park: Callable[[], None] | None = None
        self._asked = False
        """The driver has notified the device since the ring was last within reach."""
        self._wakes = self._round = 0
        self._publish_scheduled = False

    def end_run(self) -> None:
        super().end_run()
        self.polling = Polling(self._poll)

    def poll_always(self) -> None:
        """Look without being notified, until the device's run ends."""
        self.polling = Polling("on")

    def call_on_park(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever a task starts to wait for this queue; None: do not."""
        self._on_park = callback

    # ---- what a transport says -----------------------------------------------------------------------------------

    def kick(self) -> None:
        """The driver's available buffer notification. One too many does no harm (AN2)."""
        if self.stopped:
            self.stopped &= _KICKED
        self.notified = self._asked = True
        self.counts[0] += 1
        serve = self.pins.at_kick
        if serve is None or not self._serve_at_kick(serve):
            self._wake()

    def _serve_at_kick(self, serve: Callable[[], bool]) -> bool:
        """Whether ``serve`` has dealt with all that is available, so that the waiting task may go on waiting."""
        if not self.waiters or self.stopped or self.burst:
            return False
        try:
            if not serve():
                return False
            bound = self._usable()
            if bound is None or bound.by_message or bound.has_unpublished or bound.ring.again:
                return False
            return not self.polling.should_spin() and not bound.ring.request_notification()
        except Exception as error:  # as in `_publish`: this is a call of the client's session
            self._failed(error)
            return False

    def _serve_polled(self) -> bool:
        """Whether what `_has_available` tells of was dealt with as at a kick, and the ring is worth polling again."""
        serve, bound = self.pins.at_kick, self._usable()
        if serve is None or self.stopped or self.burst or bound is None or bound.by_message or bound.ring.again:
            return False
        return serve() and not bound.ring.has_available() and self.polling.should_spin()

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
        if (
            self.waiters
            and not self.stopped
            and (by_message if bound.by_message else bound.ring.again or bound.ring.has_available())
        ):
            self._wake()
        return True

    def expect(self) -> None:
        """The driver was given what it may reply to in this queue: see `Queue.replied_in`."""
        if not self.polling.expect() or not self.waiters or self.stopped:
            return
        bound = self._usable()
        if bound is not None and not bound.by_message and not bound.ring.again:
            bound.ring.withdraw_request()  # whoever is woken looks at the ring, and asks anew before it waits
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

    def singles(self, limit: int, flags: int) -> Singles | None:
        """Take up to ``limit`` buffers that come next, as `Singles`; None where the next one is none of that kind.

        Chains that have been taken for the burst are taken so too: that they are there says nothing of what follows.
        """
        bound, burst = self._usable(), self.burst
        if bound is None or self.stopped or bound.needs_messages or bound.ring.again:
            return None
        ring = bound.ring
        if burst:
            if len(burst[0].layout) != 4 or (len(burst) == 1 and not ring.has_available()):
                return None  # one alone is as quick
            for chain in burst:
                if chain.stale and chain.is_unmapped():
                    return None  # it waits for its memory; taken anew, it would be the driver's mistake
            while burst and ring.undo_pop(burst[-1]):
                burst.pop()
            if burst:
                return None
        singles = Singles.taken(bound, limit, flags, self)
        if singles is None:
            if ring.has_available():
                bound.chunk = BURST
                self._fill(bound)  # anew, what was taken for the burst
            return None
        bound.chunk = 1
        self.polling.filled()
        ring.suppress_notifications()
        return singles

    def show_singles(self, bound: BoundRing) -> None:
        """Some were completed."""
        if bound is self._bound and bound.ring.on_push is not None:
            self._publish()

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
                    self._has_available,
                    self._outstanding,
                    held=self._held,
                    reap=self._reap_ended,
                    serve=self._serve_polled,
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
                if self.meter is not None:
                    self.meter.promised = count
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
            if not burst:  # the device has taken what was there as `singles`: what is left is of another kind
                self.fill_nowait()
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
            await remote.take(bound, self.burst, max(BURST, wanted), lambda: not self.stopped, notified=self.notified)
        return len(self.burst) > before

    def _fill(self, bound: BoundRing) -> bool | None:
        """Fill the burst from a ring that may be touched; False when there is nothing, None where it takes messages."""
        if bound.by_message:
            return None
        ring = bound.ring
        try:
            chains = self._retake(bound) if ring.again else ring.pop(bound.chunk)
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
                if self.pins.replies is not None:
                    self.pins.replies.expect()
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
