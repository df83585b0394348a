"""Local copies of guest memory that can only be reached by messages, behind the same look-ups as mapped memory.

Rings do not wait. Where one meets memory without a file descriptor, the look-up raises NeedsMessages; what can wait
for the bytes gives them to `Shadow.supply` and runs the same code again, now with a copy at hand. What a device wrote
(`Shadow.written`) is delivered before the used ring.
"""

from collections.abc import Callable, Iterable, Iterator

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import GuestMemory, HotRegion, NeedsMessages, room
from vfiouser_virtio.vring.chain import Chain

# For one device, however many queues it has: a driver can name all of its RAM in every descriptor.
MAX_COPIES = 32 << 20
COPY = 1024
"""Bytes that a copy counts beside its own, for the objects that it is: 256 chains of 1023 bytes in as many buffers took
210 MB, and Python's search for garbage among those 0.15 s, for which all devices waited."""


class NoRoom(Exception):
    """There is no room for the copies of one more chain; it stays in the ring until some are delivered."""


class CopyRoom:
    """Room for the copies of all chains in flight of one device, of which half belongs to its queues in equal parts.

    So a queue whose buffers stay long with the device (a console's, while no key is pressed) cannot starve the others.
    """

    def __init__(self, queues: int = 1) -> None:
        self._share = MAX_COPIES // (2 * queues)
        self._queues = queues
        self._charged = queues * self._share
        self._waiting: list[Callable[[], None]] = []

    def change(self, before: int, after: int) -> None:
        """A queue has copies of ``after`` bytes, not of ``before``."""
        self._charged += max(after, self._share) - max(before, self._share)

    def fits(self, used: int, more: int) -> bool:
        """Whether a queue that has ``used`` bytes can have ``more``."""
        return self._charged + max(used + more, self._share) - max(used, self._share) <= MAX_COPIES

    def is_left_by_others(self, used: int) -> bool:
        """Whether the other queues of one that has ``used`` bytes have no more than their parts."""
        return self._charged - max(used, self._share) <= (self._queues - 1) * self._share

    def call_when_freed(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, once, at the next `freed`."""
        if wake not in self._waiting:
            self._waiting.append(wake)

    @property
    def is_waited_for(self) -> bool:
        """Whether `freed` has anybody to call."""
        return bool(self._waiting)

    def freed(self) -> None:
        """There may be room again."""
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()


class Shadow:
    """`readable` and `writable` of one queue: views where memory is mapped, copies where it is not.

    One chain is taken at a time: `begin`, then `Ring.pop(1, shadow)` and `supply` until it succeeds, then `claim`.
    """

    def __init__(self, memory: GuestMemory, room: CopyRoom | None = None) -> None:
        self.memory = memory
        self.room = room or CopyRoom()
        self._fetched: dict[tuple[int, int], memoryview] = {}
        self._bounces: list[tuple[int, memoryview]] = []
        # What either counts: to count them anew for each of a chain's 1024 buffers held up all devices for 30 ms.
        self._fetched_bytes = self._bounced_bytes = 0
        self.claims: dict[int, tuple[list[tuple[int, memoryview]], int]] = {}
        """By head, the chains in flight that have copies here which are not delivered, or not all of them: their
        bounces, and bytes in all. Their completion takes messages."""
        self._bytes = 0  # in all

    @property
    def hot(self) -> HotRegion:
        """Mapped memory, so that nothing changes for it."""
        return self.memory.hot

    def readable(self, address: int, length: int) -> list[memoryview]:
        """Views or fetched copies. Raises NeedsMessages where a copy is missing, Unmapped as the memory does."""
        copy = self._fetched.get((address, length))
        return self.memory.readable(address, length) if copy is None else [copy]

    def writable(self, address: int, length: int) -> list[memoryview]:
        """Views, or an empty buffer, see `written`. Raises NoRoom; GuestError if there never is room."""
        try:
            return self.memory.writable(address, length)
        except NeedsMessages:
            self._check_room(length)
            cost = length + COPY
            bounce = memoryview(room(length))
            self._bounces.append((address, bounce))
            self._bounced_bytes += cost
            self._change(cost)
            return [bounce]

    def forget(self, heads: Iterable[int]) -> None:
        """These chains have been delivered, or are taken anew, and what was done with them does not count."""
        for head in heads:
            _, size = self.claims.pop(head, ([], 0))
            self._change(-size)

    def begin(self) -> None:
        """Before a chain is looked for: nothing is known of what the driver has written since."""
        self._change(-self._fetched_bytes - self._bounced_bytes)
        self._fetched.clear()
        self._bounces.clear()
        self._fetched_bytes = self._bounced_bytes = 0

    def make_room(self, length: int) -> None:
        """Before bytes that a look-up missed are fetched: drop the bounces of that look-up.

        Raises NoRoom and GuestError as `writable`.
        """
        self._change(-self._bounced_bytes)
        self._bounces.clear()
        self._bounced_bytes = 0
        self._check_room(length)

    def supply(self, address: int, data: bytes | memoryview) -> None:
        """What a look-up missed: the next one finds it."""
        self._fetched[address, len(data)] = memoryview(data)
        self._fetched_bytes += len(data) + COPY
        self._change(len(data) + COPY)

    def claim(self, head: int) -> None:
        """The chain with this head was taken: its copies live until `forget` or `drop`."""
        self.claims[head] = self._bounces, self._bounced_bytes + self._fetched_bytes
        self._bounces = []
        self._bounced_bytes = self._fetched_bytes = 0
        self.begin()

    def written(self, chain: Chain) -> Iterator[tuple[int, memoryview]]:
        """DMA address and bytes of what a device took of the chain's bounces. `forget` it when all is delivered."""
        bounces = list(self.claims.get(chain.head, ([], 0))[0])
        touched = chain.touched()
        start = 0  # of each writable buffer, within the writable part
        for address, length in chain.ranges[chain.writable_from :]:
            if bounces and bounces[0][0] == address and len(bounces[0][1]) == length:
                _, bounce = bounces.pop(0)
                for begin, end in touched:
                    begin, end = max(begin - start, 0), min(end - start, length)
                    if begin < end:
                        yield address + begin, bounce[begin:end]
            start += length

    def drop(self) -> None:
        """The queue was reset: nothing will be written back."""
        self.claims.clear()
        self.begin()
        self._change(-self._bytes)

    def _change(self, by: int) -> None:
        self.room.change(self._bytes, self._bytes + by)
        self._bytes += by

    def _check_room(self, length: int) -> None:
        more = length + COPY
        if not self.room.fits(self._bytes, more):
            if self.claims or not self.room.is_left_by_others(self._bytes):
                raise NoRoom
            raise GuestError(
                f"a request of {self._bytes + more:#x} bytes in memory that is not shared, {COPY:#x} for each buffer "
                f"included; the copies of all that a device has taken get {MAX_COPIES:#x}, of which half is kept for "
                "its queues in equal parts"
            )
