"""Virtqueue interface of drivers (virtio 1.4, 2.6), after Rusty Russell's of 2007, and what both kinds of ring share.

::

    add_buf(sg, out_num, in_num, token)   describe a buffer; the device sees it at the next kick
    kick()                                make what was added available, notify the device if it wants that
    get_buf() -> (token, length written)  the next used buffer, or None
    restart() -> bool                     turn callbacks on again; False, and they stay off, if buffers are pending
    shutdown() -> tokens                  take every buffer back, after a reset

    DriverVirtqueue ─┬─ SplitVirtqueue   (2.7)
                     └─ PackedVirtqueue  (2.8)      `virtqueues.make_virtqueue` takes the one that was negotiated

The callback runs when the device has used buffers. As long as it returns True it stays on; when it returns False it
stays off until `restart`, so that a driver can go on by polling `get_buf`::

    while (used := vq.get_buf()) or not vq.restart():
        ...

What the device writes is checked before it is believed: `DeviceBroken` names the rule, and the queue stays broken.
"""

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.guest.errors import DeviceBroken, QueueFull
from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.protocols.virtio.ring import DESC_ALIGN, DESC_CODEC, MAX_QUEUE_SIZE, DescFlags

if TYPE_CHECKING:
    from vfiouser_virtio.guest.device import VirtioDevice

Callback = Callable[["DriverVirtqueue"], bool]
"""Called when buffers were used. True: call me again; False: not before `DriverVirtqueue.restart`."""

Sg = Sequence[tuple[int, int]]
"""Pieces of memory: (address, length)."""

# Plain ints: these are or-ed for every descriptor.
NEXT, WRITE, INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
# "The total length of a descriptor chain" (2.7.5.2).
_MAX_CHAIN_BYTES = 1 << 32


InFlight = tuple[Any, list[int], int, DmaBuffer | None]
"""A buffer in flight, as `DriverVirtqueue.add_buf` was told: the token; its descriptors, by numbers of which the first
is the buffer's id; how many bytes the device may write; its indirect table."""


class DriverVirtqueue(ABC):
    """Virtqueue in memory that the device can reach, as its driver has it.

    ``notify`` sends the available buffer notification. `close` gives the memory back, when the device has let go of it.
    Raises ValueError for a ``size`` that no queue of this kind has.
    """

    # Where the specification says which ids, and which lengths, a device may write.
    _id_rule: ClassVar[str]
    _length_rule: ClassVar[str]

    def __init__(
        self,
        memory: DmaMemory,
        index: int,
        size: int,
        notify: Callable[[], None],
        callback: Callback | None = None,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        in_order: bool = False,
        name: str = "",
    ) -> None:
        self.check_size(size)
        self.memory = memory
        self.index = index
        self.size = size
        self.name = name or f"queue {index}"
        self.callback = callback
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self.owner: VirtioDevice | None = None
        self.live = False
        """Whether the device has it: between queue_enable and a reset. Kept by the code that enables it."""
        self.stopped = False
        """Whether `kick` does nothing for now: the device is suspended. To be kicked afterwards."""
        self.broken: DeviceBroken | None = None
        self.notify = notify
        """Sends the available buffer notification."""
        self._parts = tuple(memory.alloc(length, align) for length, align in self.parts(size))
        self.desc, self.driver, self.device = (part.address for part in self._parts)
        self._views: list[memoryview] = []
        # First in, first out: with IN_ORDER that is ring order, as it must be in a split ring then (2.7.5).
        self._free = deque(range(size))
        self._in_flight: dict[int, InFlight] = {}
        self._order: deque[int] = deque()
        """Keys of `_in_flight`, as they were added; kept with IN_ORDER only."""
        self._done: deque[tuple[Any, int]] = deque()
        """Used buffers that `get_buf` has not returned yet."""
        self._tables: defaultdict[int, list[DmaBuffer]] = defaultdict(list)
        """Unused indirect tables, by their size."""
        self._callbacks = callback is not None
        self._bind(*(part.view for part in self._parts))
        if callback is None:
            self._disable_interrupts()
        else:
            self._enable_interrupts()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} size {self.size}, {self.num_in_flight} in flight>"

    # ---- what the kind of ring decides ---------------------------------------------------------------------------

    @staticmethod
    def check_size(size: int) -> None:
        """Raises ValueError for a size that no queue of this kind has."""
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise ValueError(f"a queue of {size} entries: expected 1 to {MAX_QUEUE_SIZE}")

    @staticmethod
    @abstractmethod
    def parts(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Bytes and alignment of the descriptor, driver and device area."""

    @abstractmethod
    def _bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        """Take the three areas, zeroed; every view made of them goes into `_views`."""

    @abstractmethod
    def _place(self, numbers: list[int], sg: Sg, out_num: int, flags: int) -> None:
        """Write descriptors with these flags and WRITE; there is room for them."""

    @abstractmethod
    def _fill_table(self, table: memoryview, sg: Sg, out_num: int) -> None:
        """Write an indirect table."""

    @abstractmethod
    def kick(self) -> bool:
        """Make what was added available; True when the device wanted to be notified of it, and was."""

    @property
    @abstractmethod
    def next_available(self) -> int:
        """16 bits: next_off and next_wrap of notifications with data (2.9), after what `kick` has shown."""

    @abstractmethod
    def _collect(self) -> None:
        """Move what the device has used to `_done`, by `_take`. Raises DeviceBroken for a ring that cannot be.

        With callbacks on, the device interrupts for whatever it uses afterwards.
        """

    @abstractmethod
    def _enable_interrupts(self) -> None:
        """Ask for an interrupt at the next used buffer; ends with a full barrier."""

    @abstractmethod
    def _disable_interrupts(self) -> None: ...

    # ---- to the device -------------------------------------------------------------------------------------------

    def add_buf(self, sg: Sg, out_num: int, in_num: int, token: Any) -> None:
        """Add a buffer of (address, length) pieces: ``out_num`` for the device to read, then ``in_num`` to write.

        `get_buf` returns ``token`` when the device has used it. Raises QueueFull when descriptors are lacking now,
        ValueError for what no driver may ever make (2.7.5.2, 2.7.5.3.1, 2.8.17), DeviceBroken when the device has
        broken this queue before.
        """
        if self.broken is not None:
            raise self.broken
        count = len(sg)
        if not count or out_num < 0 or in_num < 0 or out_num + in_num != count:
            raise ValueError(f"{self.name}: {count} pieces are not {out_num} to read and {in_num} to write")
        if count > self.size:
            raise ValueError(f"{self.name}: a chain of {count} is longer than the queue, {self.size}")
        readable = writable = 0
        for _, length in sg[:out_num]:
            readable += length
        for _, length in sg[out_num:]:
            writable += length
        if readable + writable > _MAX_CHAIN_BYTES:
            raise ValueError(f"{self.name}: a chain of more than 4 GiB")
        indirect = self.indirect and count > 1
        needed = 1 if indirect else count
        free = self._free
        if needed > len(free):
            raise QueueFull(f"{self.name}: {needed} descriptors are needed, {len(free)} of {self.size} are free")
        table: DmaBuffer | None = None
        if indirect:
            table = self._new_table(count)
            self._fill_table(table.view, sg, out_num)
            numbers = [free.popleft()]
            self._place(numbers, [(table.address, DESC_CODEC.size * count)], 1, INDIRECT)
        else:
            numbers = [free.popleft() for _ in sg]
            self._place(numbers, sg, out_num, 0)
        self._in_flight[numbers[0]] = token, numbers, writable, table
        if self.in_order:
            self._order.append(numbers[0])

    @property
    def num_free(self) -> int:
        """Descriptors that are free."""
        return len(self._free)

    @property
    def num_in_flight(self) -> int:
        """Buffers that were added and have not come back."""
        return len(self._in_flight) + len(self._done)

    # ---- from the device -----------------------------------------------------------------------------------------

    def get_buf(self) -> tuple[Any, int] | None:
        """The next used buffer: its token, and how many bytes the device has written from its start; None: no more.

        Raises DeviceBroken when what the device says cannot be.
        """
        if self._done or self._harvest():
            return self._done.popleft()
        return None

    def restart(self) -> bool:
        """Turn callbacks on. False, and they stay off, when used buffers are pending: take these first."""
        self._callbacks = True
        # Asked for interrupts before looking: a buffer used from now on is either seen here, or interrupts.
        self._enable_interrupts()
        if self._done or self._harvest():
            self._disable_callbacks()
            return False
        return True

    def interrupt(self) -> None:
        """The used buffer notification has arrived: run the callback, if it is on and there is something for it.

        A callback may leave buffers where they are: the next interrupt calls it again.
        """
        if not self._callbacks or self.callback is None:
            return
        if (self._done or (self.broken is None and self._harvest())) and not self.callback(self):
            self._disable_callbacks()

    @property
    def callbacks_on(self) -> bool:
        """Whether a used buffer leads to a callback."""
        return self._callbacks

    # ---- the end -------------------------------------------------------------------------------------------------

    def shutdown(self) -> list[Any]:
        """Take every buffer back; returns their tokens. Nothing is used after this but `close`.

        Raises RuntimeError while the device may still write to them: reset it, or the queue, first.
        """
        if self.live:
            raise RuntimeError(f"{self.name}: shutdown() while the device still has the queue; reset one of them first")
        self._disable_callbacks()
        tokens = [token for token, _ in self._done]
        for token, numbers, _, table in self._in_flight.values():
            tokens.append(token)
            self._release(numbers, table)
        self._done.clear()
        self._in_flight.clear()
        self._order.clear()
        return tokens

    def close(self) -> None:
        """Give the rings' memory back. Raises RuntimeError when there are buffers, or the device has the queue."""
        if self.live or self.num_in_flight:
            raise RuntimeError(f"{self.name}: close() before shutdown()")
        for view in self._views:
            view.release()
        for part in chain(self._parts, *self._tables.values()):
            self.memory.free(part)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _harvest(self) -> bool:
        """Look at the ring; True when there are used buffers. Raises DeviceBroken, but after the good ones."""
        if self.broken is not None:
            raise self.broken
        try:
            self._collect()
        except DeviceBroken:
            if not self._done:
                raise
        return bool(self._done)

    def _take(self, buffer: int, written: int, limit: int) -> tuple[int, int]:
        """A used element names this buffer: that one is done, and with IN_ORDER all before it (2.7.9, 2.8.8).

        Returns how many buffers, and how many descriptors; more than ``limit`` buffers cannot be. Raises DeviceBroken.
        """
        entry = self._in_flight.get(buffer)
        if entry is None:
            raise self._break(f"the used id is {buffer:#x}, which is not a buffer in flight", self._id_rule)
        token, numbers, room, table = entry
        if written > room:
            what = f"used length {written:#x} of buffer {buffer:#x}, which has room for {room:#x}"
            raise self._break(what, self._length_rule)
        buffers, descriptors = self._take_earlier(buffer, limit) if self.in_order else (0, 0)
        del self._in_flight[buffer]
        self._release(numbers, table)
        self._done.append((token, written))
        return buffers + 1, descriptors + len(numbers)

    def _take_earlier(self, last: int, limit: int) -> tuple[int, int]:
        """The buffers before the last one of a batch, which "are assumed to have been used completely"."""
        order, earlier = self._order, []
        while order[0] != last:
            earlier.append(order.popleft())
        order.popleft()
        if len(earlier) >= limit:
            what = f"buffer {last:#x} is used before {earlier[0]:#x}, which was made available earlier"
            raise self._break(what, "RB2")
        descriptors = 0
        for buffer in earlier:
            token, numbers, room, table = self._in_flight.pop(buffer)
            descriptors += len(numbers)
            self._release(numbers, table)
            self._done.append((token, room))
        return len(earlier), descriptors

    def _release(self, numbers: list[int], table: DmaBuffer | None) -> None:
        """The driver has a buffer's descriptors again, and its indirect table."""
        self._free += numbers
        if table is not None:
            self._tables[len(table.view)].append(table)

    def _new_table(self, count: int) -> DmaBuffer:
        """Room for an indirect table: one that was used before, or new; few sizes, so that they fit again."""
        size = DESC_CODEC.size << (count - 1).bit_length()
        spare = self._tables[size]
        return spare.pop() if spare else self.memory.alloc(size, DESC_ALIGN)

    def _disable_callbacks(self) -> None:
        self._callbacks = False
        self._disable_interrupts()

    def _break(self, what: str, rule: str) -> DeviceBroken:
        self.broken = DeviceBroken(f"{self.name}: {what}", rule)
        return self.broken
