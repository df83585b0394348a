"""Each rule about requests is found broken by a driver that breaks it, and no other rule is."""

import struct
import tracemalloc
from collections.abc import Sequence

import pytest
from support.audit_cases import CASES, breaks, check
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.audit import AuditedVirtioPci, Findings
from vfiouser_virtio.audit.chains import MAX_PEEK, SeenChain
from vfiouser_virtio.audit.types.balloon import BalloonWatch
from vfiouser_virtio.devices.balloon import Balloon
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.balloon import BalloonFeature, CommandId
from vfiouser_virtio.protocols.virtio.blk import REQUEST_HEADER_CODEC, SEGMENT_CODEC, RequestType
from vfiouser_virtio.protocols.virtio.console import Event
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK
from vfiouser_virtio.virtio import Device, Offer, queue

QUIET = Offer(poll="off")
SECTORS = 2048


# ---- blk ------------------------------------------------------------------------------------------------------------


def disk() -> tuple[Device, Offer]:
    device = Blk(size=512 * SECTORS)
    device.config.set(max_discard_seg=2, max_write_zeroes_seg=2, max_secure_erase_seg=2)
    return device, QUIET


async def ask(driver: BadDriver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> None:
    driver.start()
    header = REQUEST_HEADER_CODEC.pack(kind, 0, sector)
    await driver.request(0, [header, data] if data else [header], [room, 1] if room else [1])


def segments(count: int, *, sector: int = 0, flags: int = 0) -> bytes:
    return SEGMENT_CODEC.pack(sector, 8, flags) * count


@breaks("blk/layout", disk)
async def _short(driver: BadDriver) -> None:
    driver.start()
    await driver.request(0, [bytes(8)], [1])


@breaks("blk/capacity", disk)
async def _capacity(driver: BadDriver) -> None:
    await ask(driver, RequestType.IN, SECTORS - 1, room=1024)


@breaks("blk/flush-sector", disk)
async def _flush(driver: BadDriver) -> None:
    await ask(driver, RequestType.FLUSH, 1)


@breaks("blk/flush-data", disk)
async def _flush_data(driver: BadDriver) -> None:
    await ask(driver, RequestType.FLUSH, data=bytes(512))


@breaks("blk/data-length", disk)
async def _data(driver: BadDriver) -> None:
    await ask(driver, RequestType.OUT, data=bytes(100))


@breaks("blk/segments-length", disk)
async def _segments(driver: BadDriver) -> None:
    await ask(driver, RequestType.WRITE_ZEROES, data=segments(1) + bytes(3))


@breaks("blk/get-id-length", disk)
async def _get_id(driver: BadDriver) -> None:
    await ask(driver, RequestType.GET_ID, room=21)


@breaks("blk/discard-segments", disk)
async def _discard(driver: BadDriver) -> None:
    await ask(driver, RequestType.DISCARD, data=segments(3))


@breaks("blk/write-zeroes-segments", disk)
async def _zeroes(driver: BadDriver) -> None:
    await ask(driver, RequestType.WRITE_ZEROES, data=segments(3))


@breaks("blk/secure-erase-segments", disk)
async def _erase(driver: BadDriver) -> None:
    await ask(driver, RequestType.SECURE_ERASE, data=segments(3))


@breaks("blk/discard-unmap", disk)
async def _unmap(driver: BadDriver) -> None:
    await ask(driver, RequestType.DISCARD, data=segments(1, flags=1))


# ---- rng, input -----------------------------------------------------------------------------------------------------


@breaks("rng/readable", lambda: (Rng(), QUIET))
async def _rng(driver: BadDriver) -> None:
    driver.start()
    await driver.request(0, [b"seed"], [16])


@breaks("input/event-buffer", lambda: (Input(), QUIET))
async def _event(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))
    await driver.request(0, [], [7])
    # A device looks at eventq when it has an event.
    driver.function.core.queues[0].fill_nowait()


@breaks("input/status-buffer", lambda: (Input(), QUIET))
async def _status(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))
    await driver.request(1, [bytes(4)])


SELECT, SUBSEL, SIZE, UNION = 0, 1, 2, 8


def select(driver: BadDriver, *fields: int) -> None:
    for field in fields:
        driver.set_config(field, 1, 1)


@breaks("input/query", lambda: (Input(), QUIET))
def _query(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))
    select(driver, SUBSEL, SELECT)
    driver.config(SIZE, 1)
    select(driver, SELECT)
    driver.config(SIZE, 1)


async def test_an_input_device_is_queried_once_both_are_written() -> None:
    async with bad_driver(Input(), QUIET) as driver:
        driver.start(queues=(0, 1))
        for order in ((SELECT, SUBSEL), (SUBSEL, SELECT), (SELECT, SELECT, SUBSEL)):
            select(driver, *order)
            for field in (SELECT, SIZE, UNION, UNION + 1, SIZE):
                driver.config(field, 1)
        assert driver.broken == {}


@pytest.mark.parametrize("fields", [(), (SELECT,), (SUBSEL,)])
async def test_after_a_reset_nothing_is_selected(fields: Sequence[int]) -> None:
    async with bad_driver(Input(), QUIET) as driver:
        driver.start(queues=(0, 1))
        select(driver, SELECT, SUBSEL)
        driver.config(SIZE, 1)
        driver.start(queues=(0, 1))
        select(driver, *fields)
        driver.config(UNION, 1)
        assert set(driver.broken) == {"input/query"}


# ---- console --------------------------------------------------------------------------------------------------------


def console() -> tuple[Device, Offer]:
    return Console(chardev=["null", "null"]), QUIET


@breaks("console/receive-readable", console)
async def _receive(driver: BadDriver) -> None:
    driver.start(queues=range(6))
    await driver.request(0, [b"x"], [16])
    driver.function.core.queues[0].fill_nowait()


@breaks("console/transmit-writable", console)
async def _transmit(driver: BadDriver) -> None:
    driver.start(queues=range(6))
    await driver.request(1, [b"x"], [1])


@breaks("console/device-ready", console)
async def _ready(driver: BadDriver) -> None:
    driver.start(queues=range(6))
    await driver.request(3, [struct.pack("<IHH", 0, Event.PORT_READY, 1)])


# ---- balloon --------------------------------------------------------------------------------------------------------


def balloon() -> tuple[Device, Offer]:
    return Balloon(free_page_hint=True), QUIET


def start_balloon(driver: BadDriver) -> None:
    driver.start(queues=range(4), without=BalloonFeature.PAGE_POISON.mask)


@breaks("balloon/deflate-early", balloon)
async def _deflate(driver: BadDriver) -> None:
    start_balloon(driver)
    # Both before the device has its turn.
    driver.add(0, [struct.pack("<I", 0x1000)])
    driver.add(1, [struct.pack("<I", 0x1000)])
    inflate, deflate = driver.function.core.queues[:2]
    inflate.fill_nowait()
    deflate.fill_nowait()
    await driver.settle()


@breaks("balloon/stats-one", balloon)
async def _one(driver: BadDriver) -> None:
    start_balloon(driver)
    stats = struct.pack("<HQ", 1, 2)
    await driver.request(2, [stats])
    await driver.request(2, [stats])
    driver.function.core.queues[2].fill_nowait()


@breaks("balloon/stats-same", balloon)
async def _same(driver: BadDriver) -> None:
    start_balloon(driver)
    statsq = driver.function.core.queues[2]
    for tag in (1, 2):
        await driver.request(2, [struct.pack("<HQ", tag, 2)])
        statsq.fill_nowait()
        for chain in statsq.uncompleted_chains():
            chain.complete()
        await driver.settle()


@breaks("balloon/hint-size", balloon)
async def _hint(driver: BadDriver) -> None:
    start_balloon(driver)
    await driver.request(3, [bytes(8)])
    driver.function.core.queues[3].fill_nowait()


@breaks("balloon/hint-start", balloon)
async def _hint_start(driver: BadDriver) -> None:
    start_balloon(driver)
    await hint(driver, [], [4096])


async def hint(driver: BadDriver, out: Sequence[bytes], in_: Sequence[int] = ()) -> None:
    """A buffer in free_page_vq; the device looks at it."""
    await driver.request(3, out, in_)
    driver.function.core.queues[3].fill_nowait()


async def test_hints_between_an_id_and_stop_are_no_finding() -> None:
    async with bad_driver(*balloon()) as driver:
        start_balloon(driver)
        identity, stop = struct.pack("<I", 2), struct.pack("<I", CommandId.STOP)
        await hint(driver, [identity])
        await hint(driver, [], [4096])
        await hint(driver, [], [4096])
        await hint(driver, [stop])
        assert driver.broken == {}
        await hint(driver, [], [4096])
        assert set(driver.broken) == {"balloon/hint-start"}


@breaks("balloon/hint-once", balloon)
async def _hint_once(driver: BadDriver) -> None:
    start_balloon(driver)
    for _ in range(2):
        await driver.request(3, [struct.pack("<I", 2)])
        driver.function.core.queues[3].fill_nowait()


async def test_requests_to_what_a_disk_has_lost_are_no_finding() -> None:
    async with bad_driver(*disk()) as driver:
        driver.start()
        driver.function.core.device.config.update(capacity=SECTORS // 2)
        header = REQUEST_HEADER_CODEC.pack(RequestType.IN, 0, SECTORS - 1)
        await driver.request(0, [header], [512, 1])
        assert driver.broken == {}
        await driver.request(0, [header], [1024, 1])
        assert set(driver.broken) == {"blk/capacity"}
        driver.findings.by_rule.clear()
        driver.start()
        await driver.request(0, [header], [512, 1])
        assert set(driver.broken) == {"blk/capacity"}


async def test_a_queue_reset_takes_buffers_back() -> None:
    async with bad_driver(*balloon()) as driver:
        start_balloon(driver)
        page, stats = struct.pack("<I", 0x1000), struct.pack("<HQ", 1, 2)
        queues = driver.function.core.queues
        driver.add(0, [page])
        driver.add(2, [stats])
        for number in (0, 2):
            queues[number].fill_nowait()
            driver.set("queue_select", number)
            driver.set("queue_reset", 1)
            while driver.get("queue_reset"):
                await driver.settle()
            driver.queue(number)
        driver.add(1, [page])
        driver.add(2, [stats])
        for number in (1, 2):
            queues[number].fill_nowait()
        await driver.settle()
        assert driver.broken == {}


class Pages:
    """`Memory` that is one buffer of page numbers, as many as are looked at."""

    hot: HotRegion = (1, 0, memoryview(b""), memoryview(b""), 0)

    def __init__(self, first: int) -> None:
        self._raw = memoryview(struct.pack(f"<{MAX_PEEK // 4}I", *range(first, first + MAX_PEEK // 4)))

    def readable(self, address: int, length: int) -> list[memoryview]:
        return [self._raw[address : address + length]]

    writable = readable


def test_pages_in_flight_are_kept_in_mind_up_to_a_number() -> None:
    findings = Findings()
    watch = BalloonWatch(AuditedVirtioPci(Balloon(), findings=findings).core, findings)

    def offers(queue: int, head: int, first: int) -> None:
        watch.available(SeenChain(queue, head, [(0, MAX_PEEK)], [], Pages(first)))

    tracemalloc.start()
    try:
        for head in range(1024):  # of 256 pages each that are looked at
            offers(0, head, head * 256)
        assert tracemalloc.get_traced_memory()[0] < 32 << 20
    finally:
        tracemalloc.stop()
    watch.used(0, 0)
    offers(1, 0, 0)
    assert not findings.by_rule
    offers(1, 0, MAX_PEEK // 4)
    assert set(findings.by_rule) == {"balloon/deflate-early"}


async def test_a_page_that_two_buffers_inflate_is_acknowledged_with_the_second() -> None:
    async with bad_driver(*balloon()) as driver:
        start_balloon(driver)
        page = struct.pack("<I", 0x1000)
        for queue in (0, 0, 1):
            driver.add(queue, [page])
        inflate, deflate = driver.function.core.queues[:2]
        inflate.fill_nowait()
        first, _ = inflate.burst
        first.complete()
        deflate.fill_nowait()
        await driver.settle()
        assert set(driver.broken) == {"balloon/deflate-early"}


PREFIXES = ("blk/", "rng/", "input/", "console/", "balloon/")
RULES_HERE = [rule for rule, (case, _) in CASES.items() if case.__module__ == __name__]


@pytest.mark.parametrize("rule", RULES_HERE)
async def test_rule(rule: str) -> None:
    assert rule.startswith(PREFIXES)
    await check(rule)


class Bare(Device):
    """A disk, by its id, of which nothing else is there."""

    device_id = 2
    requestq = queue(16)

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.complete()


async def test_a_device_without_its_configuration_is_watched_all_the_same() -> None:
    async with bad_driver(Bare(), QUIET) as driver:
        await ask(driver, RequestType.OUT, 1 << 40, data=bytes(512))
        await ask(driver, RequestType.DISCARD, data=segments(100))
        assert driver.get("device_status") == DRIVER_OK
        assert not driver.broken


@pytest.mark.parametrize(("page", "seen"), [(255, True), (256, False)])
def test_of_one_request_some_pages_are_looked_at(page: int, seen: bool) -> None:
    """A burst of long ones held up all devices."""
    findings = Findings()
    watch = BalloonWatch(AuditedVirtioPci(Balloon(), findings=findings).core, findings)
    watch.available(SeenChain(0, 1, [(0, MAX_PEEK)], [], Pages(0)))
    watch.available(SeenChain(1, 2, [(0, 4)], [], Pages(page)))
    assert ("balloon/deflate-early" in findings.by_rule) is seen
