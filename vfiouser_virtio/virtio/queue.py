"""Virtqueue API for authors (virtio 1.4, 2.6): buffers of the driver by ``async for``.

It is declared by `Device.add_queue`, or by `queue` in the body of a class. What is behind it, a `Virtqueue`, belongs to
the `DeviceCore` that serves the device.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE
from vfiouser_virtio.virtio.pins import Pinned
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.virtio.virtqueue import Virtqueue
from vfiouser_virtio.vring import Chain
from vfiouser_virtio.vring.descriptors import WRITE

_ABANDONED = Stop.UNTIL_KICK.value


class Queue:
    """Virtqueue of a device, for its author: iterate over it, from one task or several.

    Nothing but `index` and `size` can be used before the device is served, nor after another device has taken over.
    """

    __slots__ = ("_max_size", "_virtqueue", "index")

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        """0 for the first queue of a device."""
        self._max_size = max_size
        self._virtqueue: Virtqueue | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.index} size {self.size}>"

    @property
    def max_size(self) -> int:
        """The largest number of entries that the driver may choose, 1 to 32768."""
        return self._max_size

    @property
    def size(self) -> int:
        """The number of entries: what the driver has chosen, or before that `max_size`."""
        return self._max_size if self._virtqueue is None else self._virtqueue.size

    @property
    def enabled(self) -> bool:
        """Whether the driver has enabled the queue (``queue_enable``), and not reset it since."""
        return self._virtqueue is not None and self._virtqueue.enabled

    @property
    def abandoned(self) -> bool:
        """Whether the client has left, and with it the guest: until another one goes on, no buffer will come."""
        return self._virtqueue is not None and bool(self._virtqueue.stopped & _ABANDONED)

    # ---- notifications -------------------------------------------------------------------------------------------

    @property
    def notifications(self) -> int:
        """Available buffer notifications of the driver since the device's last reset."""
        return 0 if self._virtqueue is None else self._virtqueue.counts[0]

    @property
    def interrupts(self) -> int:
        """Used buffer notifications (interrupts) that were sent to the driver since the device's last reset."""
        return 0 if self._virtqueue is None else self._virtqueue.counts[1]

    @property
    def coalescing(self) -> tuple[int, int]:
        """What `coalesce` has set: chains and microseconds; zeros at first."""
        return (0, 0) if self._virtqueue is None else self._virtqueue.coalescing

    def coalesce(self, max_packets: int, max_usecs: int, *, until_reset: bool = False) -> None:
        """Send an interrupt only when so many chains have been completed since the last, or so long after the first.

        What is completed is shown to the driver as ever, and whether it wants an interrupt is looked at when one would
        be sent. 0 for one of the two: send each at once, as at first; so does a time below 20 µs, and a ring
        that is reached by messages. No more than half of the ring waits. The setting holds until the device is reset;
        ``until_reset``: until the driver resets this queue, where the setting before holds again.
        """
        self._served().coalesce(max_packets, max_usecs, until_reset=until_reset)

    # ---- buffers -------------------------------------------------------------------------------------------------

    def __aiter__(self) -> "Queue":
        return self

    async def __anext__(self) -> Chain:
        """The next chain; waits until there is one. Raises GuestError when the driver has broken the ring."""
        virtqueue = self._virtqueue
        if virtqueue is None:
            raise self._unserved()
        if not virtqueue.ready():
            await virtqueue.wait_chain()
        return virtqueue.burst.popleft()

    def bursts(
        self,
        *,
        at_once: bool = False,
        reap: Callable[[], bool] | None = None,
        at_kick: Callable[[], bool] | None = None,
    ) -> "Bursts":
        """Iterate by bursts: ``async for burst in queue.bursts()``, then ``for chain in burst``, without an ``await``.

        The chains of a burst have been taken from the ring at once, and what of them is completed is shown to the
        driver at once, with one interrupt: at the end of the burst, or when the device awaits something in its midst.
        A burst ends early when it is time to let others run, or when the driver wants its buffers back; the chains that
        are left come with the next one. For devices that complete most chains on the spot.

        ``at_once`` is a promise not to await anything within a burst: then nothing has to be prepared for that case,
        which saves a round of the event loop for each burst.

        ``reap`` does what other input asks for and that takes no task: it completes the chains under `hold` whose work
        has ended, or what has come in another queue, and returns whether there was any. It is called at times while the
        queue is polled, so that this needs no round of the event loop; at other times the device has to do it by
        itself.

        ``at_kick`` is called at a notification, or when polling finds something, while the next burst is waited for: it
        may take and complete `Singles`, in some 20 µs, and returns whether those were all. Then there is no burst, and
        no round of the event loop.
        """
        virtqueue = self._served()
        virtqueue.pins.reap, virtqueue.pins.at_kick = reap, at_kick
        return Bursts(virtqueue, at_once)

    async def next(self) -> Chain:
        """As iterating: the next chain. Raises GuestError when the driver has broken the ring."""
        return await self.__anext__()

    def next_nowait(self) -> Chain | None:
        """The next chain, or None while there is none that can be had without waiting.

        None as well in memory that has to be fetched by messages (QEMU without ``share=on``): `next` waits for them.
        Raises GuestError as `next` does.
        """
        virtqueue = self._virtqueue
        if virtqueue is None:
            raise self._unserved()
        burst = virtqueue.burst
        if (not burst and not virtqueue.fill_nowait()) or virtqueue.stopped:
            return None
        # `is_unmapped` looks at the same first, but a call takes longer than all of this.
        return None if burst[0].stale and burst[0].is_unmapped() else burst.popleft()

    def take_singles(self, limit: int, *, writable: bool) -> Singles | None:
        """Up to ``limit`` buffers that come next, as far as each is one piece of memory to be written, or to be read.

        None where the next one is of another kind, or there is none: `next_nowait` says which. They must be given back
        by `Singles.end` before the next await, and before anything else is done with the queue.
        """
        return self._served().singles(limit, WRITE if writable else 0)

    async def wait(self, count: int = 1) -> None:
        """Return when ``count`` chains can be had with `next_nowait`, which is to be called before the next await.

        For devices that have to have several for one thing, and have put back those they had. Wherever the memory is:
        what takes messages has been fetched then. Raises GuestError as `next` does.
        """
        await self._served().wait_chains(count)

    def complete_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """`Chain.complete` each of these, of this queue, with so many bytes written; the driver sees all or none.

        Raises AuthorError as `Chain.complete`.
        """
        ring = used[0][0].ring
        if ring is None:
            raise AuthorError(f"chain {used[0][0].head:#x} completed twice")
        # Told after each, the ring's owner may show the first ones at once.
        on_push, ring.on_push = ring.on_push, None
        try:
            for chain, written in used:
                chain.complete(written)
        finally:
            ring.on_push = on_push
            if on_push is not None:
                on_push()

    def put_back(self, chain: Chain) -> None:
        """Give back a chain that was not completed: it is the next one again, anew, with nothing taken or written.

        ``chain`` itself is of no use any more: nothing can be read of it, and to complete it has no effect. What was
        stored in its buffers stays there. Raises AuthorError for a chain that was completed.
        """
        self._served().put_back(chain)

    def has(self, chain: Chain) -> bool:
        """Whether the device still has this chain, which it has not completed: the driver may reset the queue alone.

        For a device that awaits while it works for a chain, and uses none of its buffers: those are kept by `pinned`.
        """
        return self._virtqueue is not None and self._virtqueue.has(chain)

    def replied_in(self, queue: "Queue") -> None:
        """Say that drivers reply in ``queue`` to what they are given here: as packets received by packets sent.

        Where a driver is quick with it, ``queue`` is polled for a moment after each interrupt for this one. It holds
        until the device is reset.
        """
        self._served().pins.replies = queue._served()  # noqa: SLF001 - of the same class

    # ---- buffers that the kernel uses ----------------------------------------------------------------------------

    def pinned(self, chain: Chain) -> Pinned:
        """A context in which the chain's buffers stay mapped while the device awaits, so that the kernel may use them.

        When the client unmaps that memory and will not wait any longer, or the driver resets the device, the block is
        cancelled: ``pinned.revoked`` is True afterwards, and the request must fail.
        """
        virtqueue = self._served()
        return Pinned(virtqueue.pins, virtqueue.memory, lambda: chain.ranges)

    def hold(self, chain: Chain, cancel: Callable[[], None]) -> Callable[[], None]:
        """As `pinned`, for work that is no task of its own: the buffers stay mapped until what is returned is called.

        ``cancel`` is called where `pinned` would cancel its block: the request must end soon, and fail.
        """
        virtqueue = self._served()
        pin = virtqueue.pins.add(virtqueue.memory, lambda: chain.ranges, cancel)
        virtqueue.pins.held += 1

        def release() -> None:
            virtqueue.pins.held -= 1
            virtqueue.pins.remove(pin)

        return release

    # ---- for DeviceCore ------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Declare another size, any from 1 to 32768: before the device is served, see `Device.resize_queues`."""
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise AuthorError(f"queue {self.index}: size {size} is not 1 to {MAX_QUEUE_SIZE}")
        self._max_size = size

    def attach(self, virtqueue: Virtqueue) -> None:
        """Use this virtqueue from now on."""
        self._virtqueue = virtqueue

    def _served(self) -> Virtqueue:
        if self._virtqueue is None:
            raise self._unserved()
        return self._virtqueue

    def _unserved(self) -> AuthorError:
        return AuthorError(f"queue {self.index} of a device that is not being served: use it in run()")


class Bursts(AsyncIterator[Iterator[Chain]]):
    """Iterator over bursts: see `Queue.bursts`."""

    def __init__(self, virtqueue: Virtqueue, at_once: bool) -> None:
        self._virtqueue = virtqueue
        self._at_once = at_once

    def __aiter__(self) -> "Bursts":
        return self

    async def __anext__(self) -> Iterator[Chain]:
        """The next burst, with one chain at least. Raises GuestError when the driver has broken the ring."""
        virtqueue = self._virtqueue
        if not virtqueue.ready():
            await virtqueue.wait_chain()
        return virtqueue.hand_out(self._at_once)
