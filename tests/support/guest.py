"""For tests of the guest's side: memory that is just there, a device's hand on a ring, a PCI function made of bytes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.guest import DriverVirtqueue, VirtioDevice
from vfiouser_virtio.vfio_user import PrivateMemory


async def wait_forever(device: VirtioDevice, lot: trio.lowlevel.ParkingLot) -> None:
    """Ends only with what `VirtioDevice.wait` raises."""
    while True:
        await device.wait(lot)


Descriptor = tuple[int, int, int, int]  # addr, len, flags, and next or id


class Hand(ABC):
    """Does to a virtqueue's memory what a device would, and what none should; a kind of ring each."""

    def __init__(self, vq: DriverVirtqueue, memory: PrivateMemory) -> None:
        self.vq, self.memory = vq, memory
        self.taken: list[int] = []
        """Buffers that were taken and are not used yet, as the device calls them."""

    def half(self, address: int) -> memoryview:
        return self.memory.at(address, 2).cast("H")

    @abstractmethod
    def take(self) -> tuple[int, list[Descriptor]] | None:
        """The next available buffer: its id, and its descriptors in the ring."""

    @abstractmethod
    def use(self, buffer: int, written: int = 0, skipping: Sequence[int] = ()) -> None:
        """Say that a buffer is used, true or not; with IN_ORDER that others before it are, too."""

    @abstractmethod
    def asks(self) -> bool:
        """Whether the driver wants an interrupt for the next buffer that is used."""

    @abstractmethod
    def want_notifications(self, wanted: bool) -> None:
        """Ask for none, or for all; without EVENT_IDX."""

    @abstractmethod
    def want_notification_at(self, count: int) -> None:
        """Ask for one when ``count`` more descriptors have become available than were until now; with EVENT_IDX."""

    @abstractmethod
    def table(self, address: int, count: int) -> list[Descriptor]:
        """An indirect table; what links it is checked, and left out."""

    def take_all(self) -> list[int]:
        """All that is available now."""
        found = []
        while taken := self.take():
            found.append(taken[0])
        return found

    def use_next(self, written: int = 0) -> int:
        """Use the next available buffer; returns its id."""
        taken = self.take()
        assert taken is not None, "nothing is available"
        self.use(taken[0], written)
        return taken[0]


class SplitHand(Hand):
    """The device's hand on a split ring."""

    def __init__(self, vq: DriverVirtqueue, memory: PrivateMemory) -> None:
        super().__init__(vq, memory)
        self.avail_seen = 0

    @property
    def avail_idx(self) -> int:
        return self.half(self.vq.driver + 2)[0]

    @property
    def avail_flags(self) -> int:
        return self.half(self.vq.driver)[0]

    @property
    def used_event(self) -> int:
        return self.half(self.vq.driver + 4 + 2 * self.vq.size)[0]

    @property
    def used_idx(self) -> int:
        return self.half(self.vq.device + 2)[0]

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self.half(self.vq.device + 2)[0] = value & 0xFFFF

    def set_used_flags(self, value: int) -> None:
        self.half(self.vq.device)[0] = value

    def set_avail_event(self, value: int) -> None:
        self.half(self.vq.device + 4 + 8 * self.vq.size)[0] = value & 0xFFFF

    def head(self, position: int) -> int:
        """An entry of the available ring."""
        return self.half(self.vq.driver + 4 + 2 * (position % self.vq.size))[0]

    def descriptor(self, index: int, table: int | None = None) -> Descriptor:
        return read_descriptor(self.memory, (self.vq.desc if table is None else table) + 16 * index)

    def take(self) -> tuple[int, list[Descriptor]] | None:
        if self.avail_seen == self.avail_idx:
            return None
        head = index = self.head(self.avail_seen)
        self.avail_seen = (self.avail_seen + 1) & 0xFFFF
        chain = [self.descriptor(index)]
        while chain[-1][2] & 1:
            index = chain[-1][3]
            chain.append(self.descriptor(index))
        self.taken.append(head)
        return head, chain

    def use(self, buffer: int, written: int = 0, skipping: Sequence[int] = ()) -> None:
        place = self.memory.at(self.vq.device + 4 + 8 * (self.used_idx % self.vq.size), 8).cast("I")
        place[0], place[1] = buffer, written
        self.used_idx += 1 + len(skipping)

    def asks(self) -> bool:
        if self.vq.event_idx:
            return self.used_event == self.used_idx
        return not self.avail_flags & 1

    def want_notifications(self, wanted: bool) -> None:
        self.set_used_flags(int(not wanted))

    def want_notification_at(self, count: int) -> None:
        self.set_avail_event(self.avail_seen + count - 1)

    def table(self, address: int, count: int) -> list[Descriptor]:
        found = [self.descriptor(index, address) for index in range(count)]
        links = [(flags & 1, following) for _, _, flags, following in found]
        assert links == [(1, index + 1) for index in range(count - 1)] + [(0, 0)]
        return [(address, length, flags & ~1, 0) for address, length, flags, _ in found]


class PackedHand(Hand):
    """The device's hand on a packed ring; written from the words of the specification, not with speed in mind."""

    AVAIL, USED = 1 << 7, 1 << 15

    def __init__(self, vq: DriverVirtqueue, memory: PrivateMemory) -> None:
        super().__init__(vq, memory)
        self.next, self.wrap = 0, 1
        self.used, self.used_wrap = 0, 1
        self.counts: dict[int, int] = {}

    def descriptor(self, index: int) -> Descriptor:
        address, length, buffer, flags = read_descriptor(self.memory, self.vq.desc + 16 * index)
        return address, length, flags, buffer

    def moved(self, at: int, wrap: int, count: int) -> tuple[int, int]:
        """A place of the ring, so many descriptors further on."""
        return (at + count, wrap) if at + count < self.vq.size else (at + count - self.vq.size, 1 - wrap)

    def is_available(self, at: int, wrap: int) -> bool:
        flags = self.descriptor(at)[2]
        return bool(flags & self.AVAIL) == bool(wrap) and bool(flags & self.USED) != bool(wrap)

    def take(self) -> tuple[int, list[Descriptor]] | None:
        if not self.is_available(self.next, self.wrap):
            return None
        chain: list[Descriptor] = []
        while not chain or chain[-1][2] & 1:
            assert self.is_available(self.next, self.wrap), "the rest of a list is not available"
            chain.append(self.descriptor(self.next))
            self.next, self.wrap = self.moved(self.next, self.wrap, 1)
        buffer = chain[-1][3]
        self.counts[buffer] = len(chain)
        self.taken.append(buffer)
        return buffer, [(a, n, flags & ~(self.AVAIL | self.USED), b) for a, n, flags, b in chain]

    def use(self, buffer: int, written: int = 0, skipping: Sequence[int] = (), *, flags: int | None = None) -> None:
        place = self.memory.at(self.vq.desc + 16 * self.used, 16)
        place[8:12] = written.to_bytes(4, "little")
        place[12:14] = buffer.to_bytes(2, "little")
        write = 2 if written else 0
        place.cast("H")[7] = (write if flags is None else flags) | (self.AVAIL | self.USED) * self.used_wrap
        for each in (*skipping, buffer):
            self.used, self.used_wrap = self.moved(self.used, self.used_wrap, self.counts.get(each, 1))

    @property
    def driver_event(self) -> tuple[int, int, int]:
        """Offset, wrap counter and flags of the driver's event suppression structure."""
        off_wrap, flags = self.half(self.vq.driver)[0], self.half(self.vq.driver + 2)[0]
        return off_wrap & 0x7FFF, off_wrap >> 15, flags

    def set_device_event(self, offset: int, wrap: int, flags: int) -> None:
        self.half(self.vq.device)[0] = offset | wrap << 15
        self.half(self.vq.device + 2)[0] = flags

    def asks(self) -> bool:
        *place, flags = self.driver_event
        return flags == 0 or (flags == 2 and place == [self.used, self.used_wrap])

    def want_notifications(self, wanted: bool) -> None:
        self.set_device_event(0, 0, int(not wanted))

    def want_notification_at(self, count: int) -> None:
        self.set_device_event(*self.moved(self.next, self.wrap, count - 1), 2)

    def table(self, address: int, count: int) -> list[Descriptor]:
        found = [read_descriptor(self.memory, address + 16 * index) for index in range(count)]
        assert not any(flags & ~2 for _, _, _, flags in found), "only WRITE is valid in a table"
        return [(address, length, flags, 0) for address, length, _, flags in found]


def read_descriptor(memory: PrivateMemory, address: int) -> tuple[int, int, int, int]:
    """The four fields of either kind of descriptor, as they stand in memory."""
    raw = bytes(memory.at(address, 16))
    cut = (0, 8), (8, 12), (12, 14), (14, 16)
    first, second, third, fourth = (int.from_bytes(raw[a:b], "little") for a, b in cut)
    return first, second, third, fourth


@dataclass
class FakeBar:
    """What a BAR register of `FakePort` decodes."""

    size: int
    flags: int = 0
    address: int = 0


@dataclass
class FakePort:
    """A PCI function that consists of its config space, and of BARs that remember what is written to them."""

    bars: dict[int, FakeBar] = field(default_factory=dict)
    name: str = "fake"
    memory: PrivateMemory = field(default_factory=lambda: PrivateMemory(1 << 20))

    def __post_init__(self) -> None:
        self.config = bytearray(256)
        self.contents: dict[int, bytearray] = {}
        self.log: list[tuple[str, int, int, int]] = []
        self.decoding_while_sizing = False
        self.on_bar_read: Callable[[int, int, int], None] = lambda bar, offset, size: None
        self.put(0x00, 4, 0x1042_1AF4)
        self.put(0x08, 4, 0x0180_0001)
        self.put(0x2C, 4, 0x1042_5000)
        self.put(0x3D, 1, 1)
        self._next_capability, self._link = 0x40, 0x34
        for index, bar in self.bars.items():
            self.contents[index] = bytearray(min(bar.size, 1 << 20))
            self.put(0x10 + 4 * index, 4, (bar.address | bar.flags) & 0xFFFF_FFFF)
            if bar.flags & 4:
                self.put(0x14 + 4 * index, 4, bar.address >> 32)

    def put(self, offset: int, size: int, value: int) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def add_capability(self, cap_id: int, body: bytes) -> int:
        """Append to the list; ``body`` is what follows id and next."""
        at = self._next_capability
        self.put(self._link, 1, at)
        self.put(0x06, 2, 0x10)
        self.config[at : at + 2 + len(body)] = bytes([cap_id, 0]) + body
        self._link, self._next_capability = at + 1, (at + 2 + len(body) + 3) & ~3
        return at

    def add_structure(
        self, cfg_type: int, bar: int, offset: int, length: int, tail: bytes = b"", *, shmid: int = 0, cap_len: int = 0
    ) -> int:
        """A virtio capability."""
        body = bytes([cap_len or 16 + len(tail), cfg_type, bar, shmid, 0, 0])
        return self.add_capability(9, body + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + tail)

    async def config_read(self, offset: int, size: int) -> int:
        self.log.append(("config read", offset, size, 0))
        return self.get(offset, size)

    async def config_write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("config write", offset, size, value))
        if 0x10 <= offset < 0x28:
            value = self.bar_written((offset - 0x10) // 4, value)
        self.put(offset, size, value)

    def bar_written(self, index: int, value: int) -> int:
        self.decoding_while_sizing |= value == 0xFFFF_FFFF and bool(self.get(4, 2) & 3)
        if bar := self.bars.get(index):
            mask = 0xFFFF_FFFF & ~(bar.size - 1) & ~(3 if bar.flags & 1 else 0xF)
            return value & mask | bar.flags
        lower = self.bars.get(index - 1)
        if lower and lower.flags & 4:
            return value & (~(lower.size - 1) >> 32) & 0xFFFF_FFFF
        return 0

    async def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.log.append((f"bar{bar} read", offset, size, 0))
        self.on_bar_read(bar, offset, size)
        return int.from_bytes(self.contents[bar][offset : offset + size], "little")

    async def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.bar_post(bar, offset, size, value)

    def bar_post(self, bar: int, offset: int, size: int, value: int) -> None:
        self.log.append((f"bar{bar} write", offset, size, value))
        self.contents[bar][offset : offset + size] = value.to_bytes(size, "little")

    async def connect_msix(self, handlers: list[Callable[[], None]]) -> None:
        self.msix_handlers = handlers

    async def connect_intx(self, handler: Callable[[], None] | None) -> None:
        self.intx_handler = handler
