"""Each rule about rings is found broken by a driver that breaks it, and no other rule is.

A long file: one driver for each rule, of a few lines, and the table that names them.
"""

import sys

import pytest
from support.audit_cases import CASES, breaks, check
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.audit import Findings
from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.packed import PackedWatch
from vfiouser_virtio.audit.virtqueue import AuditedVirtqueue
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, PACKED_DESC_CODEC
from vfiouser_virtio.testing.driver import RAM_BASE, Ram
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, NEXT, WRITE, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.virtio import Device, Offer
from vfiouser_virtio.vring import RingFeatures

SIZE = 16


class Sink(Device):
    """Takes any buffer; completes those that it is told to."""

    device_id = 63

    def __init__(self) -> None:
        super().__init__()
        self.queue = self.add_queue(SIZE)
        self.keeps = False

    async def run(self) -> None:
        async for chain in self.queue:
            if not self.keeps:
                chain.complete()


class Keeps(Sink):
    """Keeps every buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps = True


def split(**more: bool) -> tuple[Device, Offer]:
    return Sink(), Offer(poll="off", **more)


def keeping() -> tuple[Device, Offer]:
    return Keeps(), Offer(poll="off")


def packed(**more: bool) -> tuple[Device, Offer]:
    return Sink(), Offer(poll="off", packed=True, **more)


def packed_keeping() -> tuple[Device, Offer]:
    return Keeps(), Offer(poll="off", packed=True)


def ring_of(driver: BadDriver, *, without: int = 0) -> RawSplitRing:
    driver.start(without=without)
    ring = driver.rings[0]
    assert isinstance(ring, RawSplitRing)
    return ring


def packed_of(driver: BadDriver, *, without: int = 0) -> RawPackedRing:
    driver.start(without=without)
    ring = driver.rings[0]
    assert isinstance(ring, RawPackedRing)
    return ring


def describe(driver: BadDriver, ring: RawSplitRing, index: int, flags: int, following: int = 0, size: int = 16) -> None:
    address, length = driver.alloc(size)
    ring.describe(index, (address, length, flags, following))


async def offer(driver: BadDriver, ring: RawSplitRing, *heads: int) -> None:
    ring.offer(*heads)
    driver.notify(0)
    await driver.settle()


def table(driver: BadDriver, *entries: tuple[int, int]) -> Segment:
    """An indirect table of (flags, next), with buffers of 16 bytes."""
    raw = b"".join(DESC_CODEC.pack(*driver.alloc(16), flags, following) for flags, following in entries)
    return (*driver.alloc(raw), INDIRECT)


# ---- split ----------------------------------------------------------------------------------------------------------


@breaks("split/decrement", split)
async def _decrement(driver: BadDriver) -> None:
    ring = ring_of(driver)
    for _ in range(4):
        await driver.request(0, [b"abc"])
    ring.offer(jump=-2)
    driver.notify(0)
    await driver.settle()


@breaks("split/overrun", split)
async def _overrun(driver: BadDriver) -> None:
    ring = ring_of(driver)
    ring.offer(jump=SIZE + 1)
    driver.notify(0)
    await driver.settle()


@breaks("split/head-range", split)
async def _head(driver: BadDriver) -> None:
    await offer(driver, ring_of(driver), SIZE)


@breaks("split/in-flight", keeping)
async def _in_flight(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, NEXT, 1)
    describe(driver, ring, 1, 0)
    await offer(driver, ring, 0)
    await offer(driver, ring, 1)


@breaks("split/changed", keeping)
async def _changed(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, 0)
    await offer(driver, ring, 0)
    describe(driver, ring, 0, 0)
    sink = driver.function.device
    assert isinstance(sink, Keeps)
    for chain in driver.function.core.queues[0].uncompleted_chains():
        chain.complete()
    await driver.settle()


@breaks("split/next-range", split)
async def _next(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, NEXT, SIZE)
    await offer(driver, ring, 0)


@breaks("split/loop", split)
async def _loop(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, NEXT, 1)
    describe(driver, ring, 1, NEXT, 0)
    await offer(driver, ring, 0)


@breaks("split/bytes", split)
async def _bytes(driver: BadDriver) -> None:
    ring = ring_of(driver)
    address, _ = driver.alloc(16)
    ring.describe(0, (address, 0xFFFF_FFFF, NEXT, 1))
    ring.describe(1, (address, 0xFFFF_FFFF, 0, 0))
    await offer(driver, ring, 0)


@breaks("split/long", split)
async def _long(driver: BadDriver) -> None:
    ring_of(driver)
    driver.add(0, [b"a"] * (SIZE + 1), indirect=True)
    driver.notify(0)
    await driver.settle()


@breaks("split/order", split)
async def _order(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, WRITE | NEXT, 1)
    describe(driver, ring, 1, 0)
    await offer(driver, ring, 0)


@breaks("split/indirect-negotiated", split)
async def _negotiated(driver: BadDriver) -> None:
    ring = ring_of(driver, without=Feature.INDIRECT_DESC.mask)
    ring.describe(0, (*table(driver, (0, 0)), 0))
    await offer(driver, ring, 0)


@breaks("split/indirect-next", split)
async def _with_next(driver: BadDriver) -> None:
    ring = ring_of(driver)
    address, length, flags = table(driver, (0, 0))
    ring.describe(0, (address, length, flags | NEXT, 1))
    describe(driver, ring, 1, 0)
    await offer(driver, ring, 0)


@breaks("split/indirect-nested", split)
async def _nested(driver: BadDriver) -> None:
    ring = ring_of(driver)
    ring.describe(0, (*table(driver, (NEXT, 1), (INDIRECT, 0)), 0))
    await offer(driver, ring, 0)


@breaks("split/indirect-size", split)
async def _table_size(driver: BadDriver) -> None:
    ring = ring_of(driver)
    address, _, flags = table(driver, (0, 0))
    ring.describe(0, (address, 17, flags, 0))
    await offer(driver, ring, 0)


@breaks("split/in-order-next", lambda: split(in_order=True))
async def _in_order(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, NEXT, 2)
    describe(driver, ring, 2, 0)
    await offer(driver, ring, 0)


@breaks("split/in-order-indirect", lambda: split(in_order=True))
async def _in_order_table(driver: BadDriver) -> None:
    ring = ring_of(driver)
    ring.describe(0, (*table(driver, (NEXT, 2), (0, 0), (0, 0)), 0))
    await offer(driver, ring, 0)


@breaks("split/flags", split)
async def _flags(driver: BadDriver) -> None:
    ring = ring_of(driver)
    describe(driver, ring, 0, 1 << 3)
    await offer(driver, ring, 0)


@breaks("split/avail-flags", split)
async def _avail_flags(driver: BadDriver) -> None:
    ring = ring_of(driver)
    ring.set_avail_flags(1)
    describe(driver, ring, 0, 0)
    await offer(driver, ring, 0)


@breaks("split/used-written", split)
async def _used_written(driver: BadDriver) -> None:
    ring = ring_of(driver)
    driver.ram.write(ring.device + 2, b"\1\0")
    describe(driver, ring, 0, 0)
    await offer(driver, ring, 0)


# ---- packed ---------------------------------------------------------------------------------------------------------


def segments(driver: BadDriver, *flags: int) -> list[Segment]:
    return [(*driver.alloc(16), each) for each in flags]


async def write(driver: BadDriver, ring: RawPackedRing, found: list[Segment], buffer_id: int = 0) -> None:
    ring.write(found, [buffer_id] * len(found))
    driver.notify(0)
    await driver.settle()


@breaks("packed/changed", packed_keeping)
async def _packed_changed(driver: BadDriver) -> None:
    ring = packed_of(driver)
    await write(driver, ring, segments(driver, 0))
    driver.ram.write(ring.desc, b"\1")
    for chain in driver.function.core.queues[0].uncompleted_chains():
        chain.complete()
    await driver.settle()


@breaks("packed/order", packed)
async def _packed_order(driver: BadDriver) -> None:
    await write(driver, packed_of(driver), segments(driver, WRITE, 0))


@breaks("packed/long", packed)
async def _packed_long(driver: BadDriver) -> None:
    packed_of(driver)
    driver.add(0, [b"a"] * (SIZE + 1), indirect=True)
    driver.notify(0)
    await driver.settle()


@breaks("packed/whole-list", packed)
async def _whole(driver: BadDriver) -> None:
    ring = packed_of(driver)
    ring.store([(*driver.alloc(16), 0, NEXT)])
    driver.notify(0)
    await driver.settle()


@breaks("packed/space", packed_keeping)
async def _space(driver: BadDriver) -> None:
    ring = packed_of(driver)
    for number in range(SIZE - 1):
        ring.store([(*driver.alloc(16), number, 0)])
    driver.notify(0)
    await driver.settle()
    ring.store([(*driver.alloc(16), 99, NEXT), (*driver.alloc(16), 99, 0)])
    driver.notify(0)
    await driver.settle()


@breaks("packed/id", packed_keeping)
async def _id(driver: BadDriver) -> None:
    ring = packed_of(driver)
    await write(driver, ring, segments(driver, 0), 5)
    await write(driver, ring, segments(driver, 0), 5)


@breaks("packed/indirect-negotiated", packed)
async def _packed_negotiated(driver: BadDriver) -> None:
    ring = packed_of(driver, without=Feature.INDIRECT_DESC.mask)
    await write(driver, ring, [table(driver, (0, 0))])


@breaks("packed/indirect-flags", packed)
async def _packed_flags(driver: BadDriver) -> None:
    # What is `next` in a split ring's table are the flags here.
    await write(driver, packed_of(driver), [table(driver, (0, NEXT), (0, 0))])


@breaks("packed/indirect-in-list", packed)
async def _in_list(driver: BadDriver) -> None:
    ring = packed_of(driver)
    await write(driver, ring, [*segments(driver, 0), table(driver, (0, 0))])


@breaks("packed/indirect-size", packed)
async def _packed_size(driver: BadDriver) -> None:
    ring = packed_of(driver)
    address, _, flags = table(driver, (0, 0))
    await write(driver, ring, [(address, 15, flags)])


@breaks("packed/event-flags", packed)
async def _event_flags(driver: BadDriver) -> None:
    ring = packed_of(driver)
    ring.set_event(0, flags=3)
    await write(driver, ring, segments(driver, 0))


RULES_HERE = [rule for rule, (case, _) in CASES.items() if case.__module__ == __name__]


@pytest.mark.parametrize("rule", RULES_HERE)
async def test_rule(rule: str) -> None:
    await check(rule)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
async def test_a_good_driver_is_not_accused(is_packed: bool, private: bool) -> None:
    device = Blk(size=1 << 20)
    async with bad_driver(device, Offer(packed=is_packed), private=private) as driver:
        driver.start()
        for number in range(100):
            indirect = bool(number % 2)
            done = 0
            for _ in range(number % 4 + 1):
                driver.add(0, [bytes(16)], [512, 512, 1], indirect=indirect)
            while done < number % 4 + 1:
                driver.notify(0)
                await driver.settle()
                done += driver.take_used(0)
        assert not driver.broken


async def test_what_a_driver_writes_over_a_buffer_in_flight_when_another_was_used_is_no_finding() -> None:
    """The used descriptor of a list of three frees the first three slots, where a buffer in flight was."""
    async with bad_driver(*packed_keeping()) as driver:
        ring = packed_of(driver, without=Feature.IN_ORDER.mask)
        keep = driver.function.core.queues[0].uncompleted_chains
        for count in (3, 3, SIZE - 6):
            driver.add(0, [b"a"] * count)
        driver.notify(0)
        await driver.settle()
        keep()[1].complete()
        await driver.settle()
        assert driver.take_used(0) == 1
        assert ring.free == 3
        driver.add(0, [b"longer"] * 3)
        for chain in keep():
            chain.complete()
        await driver.settle()
        assert driver.broken == {}


class Lengths:
    """`ChainWatch` that counts the descriptors of each chain."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def available(self, chain: SeenChain) -> None:
        self.seen.append(len(chain.readable))

    def used(self, queue: int, head: int) -> None:
        pass

    def queue_reset(self, queue: int) -> None:
        pass


@pytest.mark.parametrize("length", [1 << 22, 0xFFFF_FFF0], ids=["4M", "4G"])
@pytest.mark.parametrize("following", [0, 1, 0xFFFF])
async def test_an_indirect_table_of_a_hostile_driver_is_not_walked_to_its_end(following: int, length: int) -> None:
    """Of the smaller one a walk to the end is over in a second, of the larger one never."""
    async with bad_driver(*split()) as driver:
        lengths = Lengths()
        [queue] = driver.function.core.queues
        assert isinstance(queue, AuditedVirtqueue)
        queue.watch_with(driver.findings, lengths)
        ring = ring_of(driver)
        entries = driver.alloc(0x1_0000 * DESC_CODEC.size)[0]
        for index in {0, following}:
            driver.ram.write(entries + DESC_CODEC.size * index, DESC_CODEC.pack(entries, 1, NEXT, following))
        ring.describe(0, (entries, length, INDIRECT, 0))
        await offer(driver, ring, 0)
        assert driver.get("device_status") & DeviceStatus.NEEDS_RESET
        assert set(driver.broken) == {"split/long"}
        assert lengths.seen == [SIZE + 1]


async def test_an_indirect_table_of_a_hostile_driver_is_looked_at_in_part() -> None:
    async with bad_driver(*packed()) as driver:
        ring = packed_of(driver)
        entries = driver.alloc(0x1_0000 * DESC_CODEC.size)[0]
        await write(driver, ring, [(entries, 0xFFFF_FFF0, INDIRECT)])
        assert driver.get("device_status") & DeviceStatus.NEEDS_RESET
        assert set(driver.broken) == {"packed/long"}


def test_the_work_for_a_used_buffer_does_not_grow_with_the_buffers_in_flight() -> None:
    size = 256
    findings = Findings()
    watch = PackedWatch(0, size, RingFeatures(packed=True), findings, None)
    parts = [memoryview(bytearray(PACKED_DESC_CODEC.size * size)), memoryview(bytearray(4)), memoryview(bytearray(4))]
    memory = Ram(GuestMemory(), private=False)
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    try:
        for slot in range(size):
            PACKED_DESC_CODEC.pack_into(parts[0], PACKED_DESC_CODEC.size * slot, RAM_BASE, 16, slot, 0)
            watch.takes(parts, slot, 1, memory.memory)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            # In the reverse order: each used descriptor is written where a buffer was that is still in flight.
            watch.uses(parts, [(size - 1 - slot, slot, 1) for slot in range(size)])
        finally:
            sys.setprofile(before)
    finally:
        memory.close()
    assert not findings.by_rule
    assert calls < 20 * size
