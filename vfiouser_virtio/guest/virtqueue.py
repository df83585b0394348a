"""The split virtqueue, driver side (virtio 1.4, 2.7), behind Rusty Russell's interface of 2007.

::

    add_buf(sg, out_num, in_num, token)   describe a buffer; the device sees it at the next kick
    kick()                                make what was added available, notify the device if it wants that
    get_buf() -> (token, length written)  the next used buffer, or None
    restart() -> bool                     turn callbacks on again; False, and they stay off, if buffers are pending
    shutdown() -> tokens                  take every buffer back, after a reset

The callback runs when the device has used buffers. As long as it returns True it stays on; when it returns False it
stays off until `restart`, so that a driver can go on by polling `get_buf`::

    while (used := vq.get_buf()) or not vq.restart():
        ...

What the device writes is checked before it is believed: `DeviceBroken` names the rule, and the queue stays broken.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.guest.errors import DeviceBroken, QueueFull
from vfiouser_virtio.guest.ports import DmaBuffer, DmaMemory
from vfiouser_virtio.protocols.virtio.ring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    DESC_CODEC,
    MAX_QUEUE_SIZE,
    USED_ALIGN,
    AvailFlags,
    DescFlags,
    UsedFlags,
    avail_size,
    desc_size,
    used_size,
)

if TYPE_CHECKING:
    from vfiouser_virtio.guest.device import VirtioDevice

Callback = Callable[["Virtqueue"], bool]
"""Called when buffers were used. True: call me again; False: not before `Virtqueue.restart`."""

# Plain ints: these are or-ed for every descriptor.
_NEXT, _WRITE, _INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
_NO_INTERRUPT, _NO_NOTIFY = int(AvailFlags.NO_INTERRUPT), int(UsedFlags.NO_NOTIFY)
# "The total length of a descriptor chain" (2.7.5.2).
_MAX_CHAIN_BYTES = 1 << 32
# 16-bit indexes of the rings, as seen through memoryview.cast("H").
_FLAGS, _IDX, _RING = 0, 1, 2


class _InFlight(NamedTuple):
    """What `add_buf` was told, until the buffer comes back."""

    token: Any
    descriptors: list[int]
    room: int
    """Bytes that the device may write."""
    table: DmaBuffer | None


class Virtqueue:
    """One queue in memory that the device can reach; ``size`` is a power of two up to 32768.

    ``notify`` sends the available buffer notification. `close` gives the memory back, when the device has let go of it.
    """

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
        name: str = "",
    ) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ValueError(f"a split queue of {size} entries: no power of two up to {MAX_QUEUE_SIZE}")
        self.memory = memory
        self.index = index
        self.size = size
        self.name = name or f"queue {index}"
        self.callback = callback
        self.event_idx = event_idx
        self.indirect = indirect
        self.owner: VirtioDevice | None = None
        self.live = False
        """Whether the device has it: between queue_enable and a reset. Whoever enables it keeps this."""
        self.broken: DeviceBroken | None = None
        self._notify = notify
        self._parts = (
            memory.alloc(desc_size(size), DESC_ALIGN),
            memory.alloc(avail_size(size), AVAIL_ALIGN),
            # With 2.7.10's avail_event at its end the used ring is no multiple of 4, but 4-aligned.
            memory.alloc(used_size(size), USED_ALIGN),
        )
        desc, avail, used = self._parts
        self.desc, self.driver, self.device = desc.address, avail.address, used.address
        self._desc = desc.view
        # Typed views: each index is loaded and stored as one 16-bit access, which no other CPU can see half of.
        self._avail = avail.view.cast("H")
        self._used = used.view.cast("H")
        self._used_elements = used.view[4 : 4 + 8 * size].cast("I")
        self._used_event = len(self._avail) - 1
        self._avail_event = len(self._used) - 1
        self._mask = size - 1
        self._free = list(range(size - 1, -1, -1))
        self._in_flight: dict[int, _InFlight] = {}
        self._added_idx = 0  # avail.idx as it will be after the next kick
        self._last_used = 0
        self._seen_used = 0  # used.idx when it was looked at last
        self._callbacks = True
        if callback is None:
            self._disable_callbacks()

    def __repr__(self) -> str:
        return f"<Virtqueue {self.name} size {self.size}, {self.num_in_flight} in flight>"

    @property
    def num_free(self) -> int:
        """Descriptors that are free."""
        return len(self._free)

    @property
    def num_in_flight(self) -> int:
        """Buffers that were added and have not come back."""
        return len(self._in_flight)

    # ---- to the device -------------------------------------------------------------------------------------------

    def add_buf(self, sg: Sequence[tuple[int, int]], out_num: int, in_num: int, token: Any) -> None:
        """Add a buffer of (address, length) pieces: ``out_num`` for the device to read, then ``in_num`` to write.

        `get_buf` returns ``token`` when the device has used it. Raises QueueFull when descriptors are lacking now,
        ValueError for what no driver may ever make (2.7.5.2, 2.7.5.3.1), DeviceBroken when the device has broken this
        queue before.
        """
        if self.broken is not None:
            raise self.broken
        count = len(sg)
        if not count or out_num < 0 or in_num < 0 or out_num + in_num != count:
            raise ValueError(f"{self.name}: {count} pieces are not {out_num} to read and {in_num} to write")
        if count > self.size:
            raise ValueError(f"{self.name}: a chain of {count} is longer than the queue, {self.size}")
        if sum(length for _, length in sg) > _MAX_CHAIN_BYTES:
            raise ValueError(f"{self.name}: a chain of more than 4 GiB")
        indirect = self.indirect and count > 1
        needed = 1 if indirect else count
        if needed > len(self._free):
            raise QueueFull(f"{self.name}: {needed} descriptors are needed, {len(self._free)} of {self.size} are free")
        table: DmaBuffer | None = None
        flags = [0] * out_num + [_WRITE] * in_num
        if indirect:
            table = self.memory.alloc(DESC_CODEC.size * count, DESC_ALIGN)
            _store_chain(table.view, list(range(count)), sg, flags)
            head = self._free.pop()
            descriptors = [head]
            DESC_CODEC.pack_into(
                self._desc, DESC_CODEC.size * head, table.address, DESC_CODEC.size * count, _INDIRECT, 0
            )
        else:
            # Descriptors that are not available belong to the driver alone: no index sees these stores half done.
            descriptors = [self._free.pop() for _ in range(count)]
            head = descriptors[0]
            _store_chain(self._desc, descriptors, sg, flags)
        room = sum(length for _, length in sg[out_num:])
        self._in_flight[head] = _InFlight(token, descriptors, room, table)
        self._avail[_RING + (self._added_idx & self._mask)] = head
        self._added_idx = (self._added_idx + 1) & 0xFFFF

    def kick(self) -> bool:
        """Make what was added available; True when the device wanted to be notified of it, and was."""
        old, new = self._avail[_IDX], self._added_idx
        if old == new:
            return False
        if not TSO:
            full_barrier()  # the entries are stored before the index that shows them (2.7.13.3.1)
        self._avail[_IDX] = new
        # The index is stored before avail_event or flags are read, or the device falls asleep in between (2.7.13.4.1).
        full_barrier()
        if self.event_idx:
            wanted = (new - self._used[self._avail_event] - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._used[_FLAGS] & _NO_NOTIFY
        if wanted:
            self._notify()
        return wanted

    # ---- from the device -----------------------------------------------------------------------------------------

    def get_buf(self) -> tuple[Any, int] | None:
        """The next used buffer: its token, and how many bytes the device has written from its start; None: no more.

        Raises DeviceBroken when what the device says cannot be.
        """
        if self.broken is not None:
            raise self.broken
        if not self._has_used():
            return None
        at = 2 * (self._last_used & self._mask)
        head, written = self._used_elements[at], self._used_elements[at + 1]
        entry = self._in_flight.get(head)
        if entry is None:
            place = f"used.ring[{self._last_used & self._mask:#x}].id"
            raise self._break(f"{place} is {head:#x}, which is not a buffer in flight", "2.7.8")
        if written > entry.room:
            raise self._break(
                f"used length {written:#x} of buffer {head:#x}, which has room for {entry.room:#x}", "UR2"
            )
        del self._in_flight[head]
        self._release(entry)
        self._last_used = (self._last_used + 1) & 0xFFFF
        return entry.token, written

    def restart(self) -> bool:
        """Turn callbacks on. False, and they stay off, when used buffers are pending: take these first."""
        self._callbacks = True
        if self.event_idx:
            self._avail[self._used_event] = self._last_used
        else:
            self._avail[_FLAGS] = 0
        # Asked for interrupts before looking: a buffer used from now on is either seen here, or interrupts (2.7.7.1).
        full_barrier()
        self._seen_used = self._used[_IDX]
        if self._seen_used != self._last_used:
            self._disable_callbacks()
            return False
        return True

    def shutdown(self) -> list[Any]:
        """Take every buffer back; returns their tokens. Nothing is used after this but `close`.

        Raises RuntimeError while the device may still write to them: reset it, or the queue, first.
        """
        if self.live:
            raise RuntimeError(f"{self.name}: shutdown() while the device still has the queue; reset one of them first")
        self._disable_callbacks()
        entries, self._in_flight = self._in_flight, {}
        for entry in entries.values():
            self._release(entry)
        return [entry.token for entry in entries.values()]

    def close(self) -> None:
        """Give the rings' memory back. Raises RuntimeError when there are buffers, or the device has the queue."""
        if self.live or self._in_flight:
            raise RuntimeError(f"{self.name}: close() before shutdown()")
        for view in (self._avail, self._used_elements, self._used):
            view.release()
        for part in self._parts:
            self.memory.free(part)

    def interrupt(self) -> None:
        """The used buffer notification has arrived: run the callback, if it is on and there is something for it."""
        while self._callbacks and self.callback is not None and self.broken is None and self._has_used():
            seen = self._seen_used
            if not self.callback(self):
                self._disable_callbacks()
                return
            # A callback may leave buffers where they are. It is called again for those that come later, so the device
            # must be asked again, and what came meanwhile would have no interrupt.
            if not self.event_idx or not self._arm(seen):
                return

    @property
    def callbacks_on(self) -> bool:
        """Whether a used buffer leads to a callback."""
        return self._callbacks

    # ---- inside --------------------------------------------------------------------------------------------------

    def _has_used(self) -> bool:
        """Whether the device has used a buffer that was not taken. Raises DeviceBroken for an index that cannot be."""
        seen = self._used[_IDX]
        if seen == self._last_used:
            return False
        if (seen - self._last_used) & 0xFFFF > len(self._in_flight):
            follow = f"only {len(self._in_flight):#x} buffers can follow {self._last_used:#x}"
            raise self._break(f"used.idx is {seen:#x}: {follow}", "2.7.8")
        if seen != self._seen_used:
            self._seen_used = seen
            if self._callbacks and self.event_idx:
                # Interrupt for the next one after these. Stored before the index is looked at again (2.7.7.1): whoever
                # calls get_buf() until it returns None misses nothing.
                self._avail[self._used_event] = seen
                full_barrier()
            elif not TSO:
                full_barrier()  # the index is loaded before the elements that it shows
        return True

    def _arm(self, seen: int) -> bool:
        """Ask for an interrupt at the next used buffer; True when there already is one after ``seen``."""
        now = self._used[_IDX]
        self._avail[self._used_event] = now
        full_barrier()
        return self._used[_IDX] != seen

    def _disable_callbacks(self) -> None:
        self._callbacks = False
        if self.event_idx:
            # As far away as an index can be: the device crosses it once in 65536 buffers, which `interrupt` ignores.
            self._avail[self._used_event] = (self._last_used - 1) & 0xFFFF
        else:
            self._avail[_FLAGS] = _NO_INTERRUPT

    def _release(self, entry: _InFlight) -> None:
        self._free += entry.descriptors
        if entry.table is not None:
            self.memory.free(entry.table)

    def _break(self, what: str, rule: str) -> DeviceBroken:
        self.broken = DeviceBroken(f"{self.name}: {what}", rule)
        return self.broken


def _store_chain(table: memoryview, indexes: list[int], sg: Sequence[tuple[int, int]], flags: list[int]) -> None:
    """Write linked descriptors at ``indexes`` of a table."""
    last = len(indexes) - 1
    pack_into, size = DESC_CODEC.pack_into, DESC_CODEC.size
    for position, ((address, length), flag) in enumerate(zip(sg, flags, strict=True)):
        if position == last:
            pack_into(table, size * indexes[position], address, length, flag, 0)
        else:
            pack_into(table, size * indexes[position], address, length, flag | _NEXT, indexes[position + 1])
