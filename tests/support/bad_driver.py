"""Driver of a device on PCI that does everything right, but for what a test has it do: for the audit."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio.testing

from vfiouser_virtio.audit import AuditedVirtioPci, Findings
from vfiouser_virtio.background import background
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.serving.audited_faults import AuditedFaultyPci
from vfiouser_virtio.testing.driver import RAM_BASE, Ram
from vfiouser_virtio.testing.raw.bring_up import DRIVER, DRIVER_OK, FEATURES_OK
from vfiouser_virtio.testing.raw.packed import RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, RawRing, Segment, lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas
from vfiouser_virtio.transports.pci import COMMON, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR
from vfiouser_virtio.vfio_device import AnswerLater, PciRegion
from vfiouser_virtio.virtio import Device, Offer

_COMMAND, _MEMORY_AND_MASTER = 4, 6
_STEPS = 1000


class BadDriver:
    """Driver whose steps a test calls, leaves out, or puts in a wrong order."""

    def __init__(
        self, device: Device, offer: Offer | None = None, private: bool = False, faults: FaultPlan | None = None
    ) -> None:
        self.findings = Findings(device.name)
        if faults is None:
            self.function = AuditedVirtioPci(device, findings=self.findings, offer=offer)
        else:
            self.function = AuditedFaultyPci(device, findings=self.findings, faults=faults, offer=offer)
        self.ram = Ram(self.function.memory, private=private)
        self.function.region_write(PciRegion.CONFIG, _COMMAND, _MEMORY_AND_MASTER.to_bytes(2, "little"))
        self.features = 0
        self.rings: dict[int, RawRing] = {}
        self.heap = RAM_BASE

    @property
    def broken(self) -> dict[str, str]:
        """Ids of the rules that were found broken, and what was seen first."""
        return {rule: finding.first for rule, finding in self.findings.by_rule.items()}

    # ---- registers -----------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> None:
        """Any bytes anywhere in the BAR."""
        with suppress(AnswerLater):
            self.function.region_write(VIRTIO_BAR, offset, data)

    def read(self, offset: int, count: int) -> bytes:
        """Any bytes from anywhere in the BAR."""
        try:
            return bytes(self.function.region_read(VIRTIO_BAR, offset, count))
        except AnswerLater as later:
            return bytes(later.data)

    def set(self, name: str, value: int) -> None:
        """A field of the common configuration, in halves where it has 64 bits."""
        at, size = COMMON_CFG_OFFSETS[name]
        data = value.to_bytes(size, "little")
        for start in range(0, size, 4):
            self.write(COMMON + at + start, data[start : start + 4])

    def get(self, name: str) -> int:
        """A field of at most 32 bits."""
        at, size = COMMON_CFG_OFFSETS[name]
        return int.from_bytes(self.read(COMMON + at, size), "little")

    def config(self, offset: int, size: int) -> int:
        """A field of the device's configuration."""
        return int.from_bytes(self.read(DEVICE + offset, size), "little")

    def set_config(self, offset: int, value: int, size: int) -> None:
        """A field of the device's configuration."""
        self.write(DEVICE + offset, value.to_bytes(size, "little"))

    def read_isr(self) -> None:
        """ISR status."""
        self.read(ISR, 1)

    # ---- initialization ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Step 1, with the read of 0."""
        self.set("device_status", 0)
        for _ in range(_STEPS):
            if self.get("device_status") == 0:
                break
        self.rings.clear()
        self.heap = RAM_BASE
        self.ram.clear()

    def acknowledge(self) -> None:
        """Steps 2 and 3."""
        self.set("device_status", 1)
        self.set("device_status", DRIVER)

    def offered(self) -> int:
        """All feature words of the device."""
        offered = 0
        for word in range(4):
            self.set("device_feature_select", word)
            offered |= self.get("device_feature") << 32 * word
        return offered

    def accept(self, features: int) -> None:
        """Feature words, with nothing read."""
        self.features = features
        for word in range(4):
            self.set("driver_feature_select", word)
            self.set("driver_feature", features >> 32 * word & 0xFFFF_FFFF)

    def negotiate(self, *, without: int = 0, more: int = 0) -> None:
        """Steps 4 to 6: all that is offered, but for some, and some more."""
        self.accept(self.offered() & ~without | more)
        self.set("device_status", FEATURES_OK)
        self.get("device_status")

    def place(self, index: int, size: int = 16) -> tuple[int, int, int]:
        """Memory for a ring, which is made."""
        packed = bool(self.features & Feature.RING_PACKED.mask)
        addresses, end = lay_out(self.heap, packed_areas(size) if packed else split_areas(size))
        self.heap = -(-end // 4096) * 4096
        self.rings[index] = (RawPackedRing if packed else RawSplitRing)(self.ram, size, addresses, index)
        return addresses

    def queue(self, index: int, size: int = 16) -> None:
        """Step 7 for one queue."""
        addresses = self.place(index, size)
        self.set("queue_select", index)
        self.set("queue_size", size)
        for name, address in zip(("queue_desc", "queue_driver", "queue_device"), addresses, strict=True):
            self.set(name, address)
        self.set("queue_enable", 1)

    def driver_ok(self) -> None:
        """Step 8."""
        self.set("device_status", DRIVER_OK)

    def start(self, *, queues: Sequence[int] = (0,), size: int = 16, without: int = 0) -> None:
        """All steps."""
        self.reset()
        self.acknowledge()
        self.negotiate(without=without)
        for index in queues:
            self.queue(index, size)
        self.driver_ok()

    # ---- buffers -------------------------------------------------------------------------------------------------

    def alloc(self, content: bytes | int) -> tuple[int, int]:
        """Address and length of a new buffer: these bytes, or so many."""
        data = bytes(content)
        address = self.heap
        self.heap += -(-max(len(data), 1) // 16) * 16
        self.ram.write(address, data)
        return address, len(data)

    def segments(self, out: Sequence[bytes], in_: Sequence[int] = ()) -> list[Segment]:
        """A buffer for each of these bytes, to be read, then one for each of these sizes, to be written."""
        return [(*self.alloc(data), 0) for data in out] + [(*self.alloc(size), WRITE) for size in in_]

    def add(self, queue: int, out: Sequence[bytes], in_: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make a chain available."""
        segments = self.segments(out, in_)
        ring = self.rings[queue]
        if indirect:
            segments = [(*self.alloc(ring.table(segments)), INDIRECT)]
        return ring.add(segments)

    def notify(self, queue: int, *, size: int = 2) -> None:
        """The notification as it is without features of its own."""
        self.write(NOTIFY + NOTIFY_MULTIPLIER * queue, queue.to_bytes(size, "little"))

    async def settle(self) -> None:
        """The device has done what it had to do."""
        await trio.testing.wait_all_tasks_blocked()

    async def request(self, queue: int, out: Sequence[bytes], in_: Sequence[int] = ()) -> None:
        """A whole request."""
        self.add(queue, out, in_)
        self.notify(queue)
        await self.settle()
        self.take_used(queue)

    def take_used(self, queue: int) -> int:
        """Take back what the device has used; how many."""
        return len(list(iter(self.rings[queue].take_used, None)))


@asynccontextmanager
async def bad_driver(
    device: Device, offer: Offer | None = None, *, private: bool = False, faults: FaultPlan | None = None
) -> AsyncIterator[BadDriver]:
    """A device that is served, without a socket, and its driver."""
    driver = BadDriver(device, offer, private, faults)
    try:
        async with background() as tasks:
            tasks.start_soon(driver.function.serve)
            await driver.settle()
            yield driver
    finally:
        driver.ram.close()
