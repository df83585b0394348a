"""For tests of the guest's side: memory that is just there, a device's hand on a ring, a PCI function made of bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.guest import VirtioDevice, Virtqueue
from vfiouser_virtio.vfio_user import PrivateMemory


async def wait_forever(device: VirtioDevice, lot: trio.lowlevel.ParkingLot) -> None:
    """Ends only with what `VirtioDevice.wait` raises."""
    while True:
        await device.wait(lot)


class Hand:
    """Does to a virtqueue's memory what a device would, and what none should."""

    def __init__(self, vq: Virtqueue, memory: PrivateMemory) -> None:
        self.vq, self.memory = vq, memory
        self.avail_seen = 0

    def _half(self, address: int) -> memoryview:
        return self.memory.at(address, 2).cast("H")

    @property
    def avail_idx(self) -> int:
        return self._half(self.vq.driver + 2)[0]

    @property
    def avail_flags(self) -> int:
        return self._half(self.vq.driver)[0]

    @property
    def used_event(self) -> int:
        return self._half(self.vq.driver + 4 + 2 * self.vq.size)[0]

    @property
    def used_idx(self) -> int:
        return self._half(self.vq.device + 2)[0]

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._half(self.vq.device + 2)[0] = value & 0xFFFF

    def set_used_flags(self, value: int) -> None:
        self._half(self.vq.device)[0] = value

    def set_avail_event(self, value: int) -> None:
        self._half(self.vq.device + 4 + 8 * self.vq.size)[0] = value & 0xFFFF

    def head(self, position: int) -> int:
        """An entry of the available ring."""
        return self._half(self.vq.driver + 4 + 2 * (position % self.vq.size))[0]

    def descriptor(self, index: int, table: int | None = None) -> tuple[int, int, int, int]:
        """addr, len, flags, next."""
        raw = bytes(self.memory.at((self.vq.desc if table is None else table) + 16 * index, 16))
        cut = (0, 8), (8, 12), (12, 14), (14, 16)
        addr, length, flags, following = (int.from_bytes(raw[a:b], "little") for a, b in cut)
        return addr, length, flags, following

    def use(self, head: int, written: int = 0) -> None:
        """Put one element into the used ring, true or not."""
        place = self.memory.at(self.vq.device + 4 + 8 * (self.used_idx % self.vq.size), 8).cast("I")
        place[0], place[1] = head, written
        self.used_idx += 1

    def use_next(self, written: int = 0) -> int:
        """Use the next available buffer; returns its head."""
        assert self.avail_seen != self.avail_idx, "nothing is available"
        head = self.head(self.avail_seen)
        self.avail_seen = (self.avail_seen + 1) & 0xFFFF
        self.use(head, written)
        return head


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
            value = self._bar_written((offset - 0x10) // 4, value)
        self.put(offset, size, value)

    def _bar_written(self, index: int, value: int) -> int:
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
