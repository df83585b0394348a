"""FIFO behind one address of a BAR: what a driver writes queues up for the device, and the other way round."""

from collections import deque
from collections.abc import Callable
from typing import Any, Self, TypeVar

import trio

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci.bar_part import BarPart, check_hook, hook_of

Method = TypeVar("Method", bound=Callable[..., Any])


class Fifo(BarPart):
    """Data port at ``offset``, ``width`` bits wide, with ``depth`` entries in each direction.

    A driver that reads takes the oldest of ``to_driver``, or gets ``empty`` where there is none (an underrun); what it
    writes goes into ``from_driver``, or is lost where that is full (an overrun). Accesses of another width are refused.
    """

    def __init__(self, offset: int, *, depth: int, width: int = 32, empty: int = 0, bar: int | None = None) -> None:
        if width not in (8, 16, 32, 64) or depth <= 0:
            raise AuthorError(f"a FIFO at {offset:#x} of {depth} entries of {width} bits: expected 8, 16, 32 or 64")
        super().__init__(offset, width // 8, bar, {width // 8})
        self.width, self.depth, self.empty = width, depth, empty
        self.to_driver: deque[int] = deque()
        """What the driver can read, the oldest first."""
        self.from_driver: deque[int] = deque()
        """What the driver has written, the oldest first."""
        self.underruns = self.overruns = 0
        self.written: Callable[[int], None] | None = None
        self.taken: Callable[[], None] | None = None
        self.waiters = trio.lowlevel.ParkingLot()

    def on_write(self, method: Method) -> Method:
        """Decorator of the method that runs after a driver has written; it gets the value, which is in the queue."""
        check_hook(self, method)
        self.write_hook = method
        return method

    def on_read(self, method: Method) -> Method:
        """Decorator of the method that runs after a driver has read, and what it has read is gone."""
        check_hook(self, method)
        self.read_hook = method
        return method

    def bound(self, owner: object, name: str, offset: int, index: int | None = None) -> Self:
        """One of a device's own."""
        mine = self.copied(name, offset)
        mine.to_driver, mine.from_driver = deque(), deque()
        mine.waiters = trio.lowlevel.ParkingLot()
        mine.written = hook_of(self.write_hook, owner, name, index, 1)[0]
        mine.taken = hook_of(self.read_hook, owner, name, index, 0)[0]
        return mine

    def power_on(self) -> None:
        """Empty."""
        self.to_driver.clear()
        self.from_driver.clear()
        self.underruns = self.overruns = 0

    # ---- for the device ------------------------------------------------------------------------------------------

    def push(self, value: int) -> bool:
        """Let the driver read ``value``; False, and it is lost, where ``to_driver`` is full."""
        if not 0 <= value < 1 << self.width:
            raise AuthorError(f"{self.name}.push({value:#x}): it has {self.width} bits")
        if len(self.to_driver) >= self.depth:
            return False
        self.to_driver.append(value)
        return True

    async def pop(self) -> int:
        """The oldest that the driver has written; waits for it."""
        await trio.lowlevel.checkpoint()
        while not self.from_driver:
            await self.waiters.park()
        return self.from_driver.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        return await self.pop()

    # ---- for the bar ---------------------------------------------------------------------------------------------

    def read_part(self, start: int, count: int) -> bytes:
        """The oldest entry."""
        self.reads += 1
        if self.to_driver:
            value = self.to_driver.popleft()
        else:
            self.underruns += 1
            value = self.empty
        if self.taken is not None:
            self.taken()
        return value.to_bytes(self.size, "little")[start : start + count]

    def write_part(self, start: int, data: bytes) -> None:
        """One more entry."""
        self.writes += 1
        if len(self.from_driver) >= self.depth:
            self.overruns += 1
            return
        value = int.from_bytes(data, "little") << 8 * start
        self.from_driver.append(value)
        self.waiters.unpark_all()
        if self.written is not None:
            self.written(value)
