"""The memory balloon as its driver has it, over every carrier: pages, statistics, hints, reports."""

import json
import os

import pytest
import trio
import trio.lowlevel
import trio.testing

from vfiouser_virtio.devices.balloon import MAX_PFNS, Balloon, example
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.guest import DmaBuffer, VirtioDevice, bound
from vfiouser_virtio.guest.drivers.balloon import BalloonPages as Driver
from vfiouser_virtio.protocols.virtio.balloon import PAGE_SIZE, CommandId, Stat
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Offer

shared = pytest.mark.virtio_carriers("loopback", "socket", "qtest", "libvfio-user", "qtest-library")
private = pytest.mark.virtio_carriers("socket-private", "qtest-private")


@pytest.fixture
def virtio_device() -> Balloon:
    return example()


def pages(guest: VirtioDevice, count: int, size: int = PAGE_SIZE) -> list[DmaBuffer]:
    """Pages of the guest's memory, which are not zero."""
    found = [guest.memory.alloc(size, PAGE_SIZE) for _ in range(count)]
    for page in found:
        page.view[:] = os.urandom(size)
    return found


async def test_the_target_is_what_the_driver_sees(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    driver: Driver = virtio_guest.driver_data
    assert await driver.num_pages() == 256
    async with trio.open_nursery() as nursery:
        seen = []

        async def wait() -> None:
            seen.append(await driver.wait_num_pages(256))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        virtio_device.set_target(8 << 20)
    assert seen == [2048]
    assert virtio_device.target == 8 << 20
    with pytest.raises(ConfigError, match="no multiple of 4096"):
        virtio_device.set_target(4097)


@shared
async def test_inflated_pages_go_back_to_the_host(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    driver: Driver = virtio_guest.driver_data
    given, kept = pages(virtio_guest, 20), pages(virtio_guest, 1)
    before = bytes(kept[0].view)
    await driver.inflate(given)
    assert not any(any(page.view) for page in given)
    assert bytes(kept[0].view) == before
    assert virtio_device.handed_back == virtio_device.actual == 20 * PAGE_SIZE
    await driver.deflate(given[:5])
    assert virtio_device.actual == 15 * PAGE_SIZE
    given[0].view[:4] = b"used"
    assert bytes(given[0].view[:4]) == b"used"
    assert virtio_device.ignored == 0


@private
async def test_of_memory_by_message_nothing_goes_back(
    virtio_device: Balloon, virtio_guest: VirtioDevice, caplog: pytest.LogCaptureFixture
) -> None:
    driver: Driver = virtio_guest.driver_data
    given = pages(virtio_guest, 3)
    before = [bytes(page.view) for page in given]
    await driver.inflate(given[:2])
    await driver.inflate(given[2:])
    await driver.report(given)
    assert [bytes(page.view) for page in given] == before
    assert (virtio_device.handed_back, virtio_device.actual) == (0, 3 * PAGE_SIZE)
    assert caplog.text.count("can be handed back") == 1


async def test_pages_that_cannot_be_given(
    virtio_device: Balloon, virtio_guest: VirtioDevice, caplog: pytest.LogCaptureFixture
) -> None:
    driver: Driver = virtio_guest.driver_data
    ring = driver.queues["inflateq"].vq.desc
    [good] = pages(virtio_guest, 1)
    for _ in range(2):
        await driver.send("inflateq", [0xFFFF_FFFF, 0xFFFF_FFFF, ring // PAGE_SIZE])
    await driver.inflate([good])  # the ring is still there
    assert virtio_device.ignored in (4 * PAGE_SIZE, 2 * PAGE_SIZE)  # by message nothing of the ring's page is touched
    assert caplog.text.count("no memory of its") == 1
    await driver.queues["inflateq"].request([b"\1\2\3"])
    await driver.queues["inflateq"].request([b"\xff\xff\xff\xff\1\2"])
    assert caplog.text.count("beyond whole page numbers") == 1


async def test_statistics_are_asked_for(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    driver: Driver = virtio_guest.driver_data
    assert driver.statistics is not None
    driver.statistics.values = {Stat.MEMFREE: 77, 999: 1, Stat.CACHES: 1 << 40}
    with trio.fail_after(60):
        while not virtio_device.last_statistics:
            await trio.lowlevel.checkpoint()
        assert await virtio_device.statistics() == {"memfree": 77, "caches": 1 << 40}
        driver.statistics.values[Stat.MEMFREE] = 78
        assert (await virtio_device.statistics())["memfree"] == 78
    assert driver.statistics.asked == 2


@shared
async def test_reported_pages_go_back_unless_they_have_a_poison_value(
    virtio_device: Balloon, virtio_guest: VirtioDevice
) -> None:
    driver: Driver = virtio_guest.driver_data
    given = pages(virtio_guest, 3, 16 * PAGE_SIZE)
    await driver.report(given[:2])
    assert not any(any(page.view) for page in given[:2])
    assert virtio_device.handed_back == 32 * PAGE_SIZE
    await virtio_guest.config.set("poison_val", 0xAA)
    await driver.report(given[2:])
    assert any(given[2].view)


async def test_hints_are_collected_and_released(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    driver: Driver = virtio_guest.driver_data
    free = pages(virtio_guest, 3)

    async def guest() -> None:
        command = await driver.wait_command()
        await driver.hint([free[0]], command=command + 7)  # of another round
        await driver.hint(free[1:], command=command)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        async with virtio_device.free_page_hints() as ranges:
            assert ranges == [(page.address, PAGE_SIZE) for page in free[1:]]
            assert any(free[1].view)  # hints are no gifts
            with pytest.raises(DeviceError, match="asked for already"):
                async with virtio_device.free_page_hints():
                    pass
    assert await driver.wait_command(CommandId.DONE) == CommandId.DONE


async def test_a_reset_ends_a_round_of_hints(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(DeviceError, match="was reset"):
                async with virtio_device.free_page_hints():
                    pass

        nursery.start_soon(ask)
        await virtio_guest.driver_data.wait_command()
        await virtio_guest.transport.write_status(0)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert virtio_device.actual == 0
    with pytest.raises(DeviceError, match="not negotiated"):
        async with virtio_device.free_page_hints():
            pass


@pytest.mark.virtio_carriers("loopback")
@pytest.mark.parametrize("virtio_feature_mask", [~(1 << 3)])
async def test_without_hints_queue_3_takes_reports_too(virtio_device: Balloon, virtio_guest: VirtioDevice) -> None:
    """As Linux before 6.11 numbers its queues, which has only those that it uses."""
    from vfiouser_virtio.guest import RequestQueue

    driver: Driver = virtio_guest.driver_data
    driver.queues = {"reporting_vq": await RequestQueue.open(virtio_guest, 3)}
    [page] = pages(virtio_guest, 1)
    await driver.report([page])
    assert not any(page.view)


async def test_statistics_are_logged_as_json(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with carry(Balloon(stats_interval=0.001, target=1 << 20)) as guest:
        driver: Driver = guest.driver_data
        assert driver.statistics is not None
        with trio.fail_after(20):
            while driver.statistics.asked < 3:
                await trio.sleep(0.001)
    lines = [text.partition("statistics ")[2] for text in caplog.messages if "statistics " in text]
    assert len(lines) >= 3
    told = json.loads(lines[0])
    assert (told["target"], told["actual"], told["memtot"]) == (1 << 20, 0, 16 << 20)


async def test_a_request_with_many_pages_lets_others_have_their_turns(virtio_device: Balloon) -> None:
    """A guest may name the same page in a quarter of a million bytes of request."""
    async with carry(virtio_device) as guest:
        driver: Driver = guest.driver_data
        rounds = 0

        async def other() -> None:
            nonlocal rounds
            while True:
                await trio.lowlevel.checkpoint()
                rounds += 1

        [page] = pages(guest, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            before = rounds
            await driver.send("inflateq", [page.address // PAGE_SIZE] * (MAX_PFNS + 1))
            # 64 numbers at a time, and other tasks after 16 of these.
            assert rounds - before >= MAX_PFNS // 64 // 16 - 4
            nursery.cancel_scope.cancel()
        assert virtio_device.handed_back == MAX_PFNS // 64 * PAGE_SIZE


@pytest.mark.parametrize("queue", ["inflateq", "reporting_vq"])
async def test_no_page_of_a_queue_that_was_reset_goes_back(virtio_device: Balloon, queue: str) -> None:
    """The driver has the buffer back then, and with it all pages of which it was not told that they are taken."""
    async with Loopback(virtio_device) as transport, bound(transport) as guest:
        driver: Driver = guest.driver_data
        requests = driver.queues[queue].vq
        given = pages(guest, 80, 2 * PAGE_SIZE)  # each of which costs a call
        async with trio.open_nursery() as nursery:
            if queue == "inflateq":
                numbers = [page.address // PAGE_SIZE for page in given]
                nursery.start_soon(driver.send, queue, [number for number in numbers for _ in range(64)])
            else:
                nursery.start_soon(driver.report, given)
            while any(given[0].view[:PAGE_SIZE]):
                await trio.lowlevel.checkpoint()
            transport.core.reset_queue(requests.index)
            assert any(given[-1].view[:PAGE_SIZE])
            for page in given:
                page.view[:4] = b"used"
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert all(bytes(page.view[:4]) == b"used" for page in given)


async def test_behind_an_iommu_page_numbers_mean_nothing(
    virtio_device: Balloon, caplog: pytest.LogCaptureFixture
) -> None:
    async with carry(virtio_device, offer=Offer(iommu_platform=True)) as guest:
        [page] = pages(guest, 1)
        await guest.driver_data.inflate([page])
        assert any(page.view)
        await guest.driver_data.report([page])  # which has the address in a descriptor
        assert not any(page.view)
    assert (virtio_device.handed_back, virtio_device.ignored) == (PAGE_SIZE, 0)
    assert "behind an IOMMU" in caplog.text


async def test_another_object_goes_on_where_this_one_was() -> None:
    first, second = example(), example()
    async with Loopback(first) as transport, bound(transport) as guest:
        driver: Driver = guest.driver_data
        await driver.inflate(pages(guest, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.hint, [])
            async with first.free_page_hints():
                await transport.core.replace(second)
        assert await driver.wait_command(CommandId.DONE) == CommandId.DONE
        first.close()
        assert second.actual == second.handed_back == 2 * PAGE_SIZE
        with trio.fail_after(60):
            assert (await second.statistics())["memtot"] == 16 << 20
        async with trio.open_nursery() as nursery:

            async def hint() -> None:
                await driver.hint([], command=await driver.wait_command())

            nursery.start_soon(hint)
            async with second.free_page_hints():
                assert await guest.config.get_int("free_page_hint_cmd_id") == 3  # none is used again
