"""Ring behind a virtqueue's registers (virtio 1.4, 2.6): from queue_enable to a reset, and what is saved of it.

What is done for each request is in `virtqueue`; here is what comes now and then.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar

import trio

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.virtio.pins import Pins
from vfiouser_virtio.virtio.queue_registers import QueueRegisters
from vfiouser_virtio.virtio.stop import UNTOUCHABLE, Stop
from vfiouser_virtio.virtio.virtqueue_state import VirtqueueState
from vfiouser_virtio.vring import Area, Chain, CopyRoom, Ring, SplitRing

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.throttle import QueueMeter
    from vfiouser_virtio.vring import PackedRing

MISSED = 1.0
"""Seconds that a ring's memory may be unmapped before that is logged."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class QueueRing(QueueRegisters, ABC):
    """Registers of a virtqueue, and the ring behind them once it is enabled. Arguments are those of `Virtqueue`."""

    split_ring: ClassVar[type[SplitRing]] = SplitRing
    packed_ring: "ClassVar[type[PackedRing] | None]" = None
    """What is behind it, as negotiated. None: `PackedRing`, which is imported with the first: few are offered one."""
    meter: "QueueMeter | None" = None
    """Of a device with limits. In the class, since that saves an attribute of all the others: see `Pins`."""

    def __init__(
        self,
        index: int,
        max_size: int,
        memory: GuestMemory,
        *,
        interrupt: Callable[[], None],
        failed: Callable[[Exception], None],
        warn: Callable[[str], None],
        room: CopyRoom | None = None,
    ) -> None:
        super().__init__(index, max_size)
        self.memory = memory
        self.pins = Pins()
        self.burst: deque[Chain] = deque()
        """Chains that were taken from the ring, and not handed out yet."""
        self.stopped = Stop.NOT_DRIVER_OK.value
        """The reasons to hand out nothing: the value of a `Stop`; 0 for none."""
        self.notified = False
        """The driver has sent a notification since the last reset."""
        self.counts = [0, 0]
        """Notifications of the driver, and interrupts, since `forget_counts`."""
        self._interrupt = interrupt
        self._failed = failed
        self._warn = warn
        self._room = room or CopyRoom()
        self._spawn: Spawn | None = None
        self._bound: BoundRing | None = None

    @abstractmethod
    def _wake(self) -> None:
        """Have the ring looked at again: something has changed."""

    @abstractmethod
    def _pushed(self) -> None:
        """A chain of the ring was completed."""

    @abstractmethod
    def _usable(self) -> BoundRing | None:
        """The ring if it may be touched now; bound again after a change of the memory map."""

    def limit(self, meter: "QueueMeter") -> None:
        """What is handed out is paid for: for `Throttle`, before the queue is enabled for the first time."""
        self.meter = meter
        self.burst = meter.burst

    # ---- the device's run ----------------------------------------------------------------------------------------

    def begin_run(self, spawn: Spawn) -> None:
        """The device runs: ``spawn`` starts tasks that end with that run."""
        self._spawn = spawn

    def end_run(self) -> None:
        """The run has ended, and with it all that was spawned."""
        self._spawn = self.pins.reap = self.pins.at_kick = self.pins.replies = None

    # ---- registers, status, and what else a transport says -------------------------------------------------------

    def may_be_next(self, next_available: int) -> bool:
        """Whether a notification can say this of where the driver goes on: next_off and next_wrap, 16 bits (2.9)."""
        return self._bound is None or self._bound.ring.may_be_next(next_available)

    def enable(self) -> None:
        """``queue_enable`` = 1. Raises GuestError for rings that are not aligned (2.7), or not in guest memory."""
        areas = self.areas()
        for area in areas:
            self.memory.check(area.address, area.length, write=area.write)
        self._bound = self._new_ring(areas)
        self.enabled = True
        self._wake()

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        ring_class = (self.packed_ring or packed_ring()) if self.features.packed else self.split_ring
        ring: Ring
        if self.meter is None:
            ring = ring_class(self.size, self.memory, self.features)
        else:
            from vfiouser_virtio.virtio.throttle import MeteredRing, metered  # only here: see `core`

            ring = metered(ring_class)(self.size, self.memory, self.features)
            assert isinstance(ring, MeteredRing)
            ring.meter = self.meter
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

    def has(self, chain: Chain) -> bool:
        """Whether the chain is of this ring, and not completed: not of one before a reset."""
        return self._bound is not None and chain.ring is self._bound.ring

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
            if self._spawn is not None and self._room.is_waited_for:
                self._spawn(self._say_freed)  # to other queues, where it is this one alone that is reset
        self.clear()
        self.notified = False
        self.burst.clear()
        if self.meter is not None:
            self.meter.forgets()
        self.pins.cancel()

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
        heads = bound.ring.offer_again(chains)
        bound.shadow.forget(heads)
        if self.meter is not None:
            self.meter.gives_back(heads)
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

    # ---- memory that is not there --------------------------------------------------------------------------------

    async def _tell_missed(self, bound: BoundRing) -> None:
        """QEMU's remapping of RAM unmaps the ring for some milliseconds; what lasts is worth a line."""
        await trio.sleep(MISSED)
        bound.missed = False
        if bound.alive() and not self.stopped & UNTOUCHABLE.value and not bound.bind():
            bound.missed = True  # said once, until a reset
            self._warn(
                f"queue {self.index} waits for its ring's memory, which its client has unmapped or mapped read-only "
                f"({bound.lacks}): until it is mapped again, or the driver resets the device, no request is served"
            )


def packed_ring() -> "type[PackedRing]":
    """The class of packed rings, which few devices offer: those that do ask for it before they run."""
    from vfiouser_virtio.vring import PackedRing  # only here: see `QueueRing.packed_ring`

    return PackedRing
