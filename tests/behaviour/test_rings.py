"""Every device over every kind of ring: what a driver makes of it is the same, whatever was offered underneath."""

import os

import pytest
import trio
from support.consoles import HostedConsole, talk

from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import PackedVirtqueue, SplitVirtqueue, VirtioDevice
from vfiouser_virtio.guest.drivers import Disk
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.virtio import Offer

SECTOR, SECTORS = 512, 2048
CONTENT = os.urandom(SECTOR * SECTORS)

RINGS = {
    "bare": Offer(event_idx=False, indirect_desc=False),
    "in-order": Offer(in_order=True, suspend=True),
    "with-data": Offer(notification_data=True, suspend=True),
    "named": Offer(notif_config_data=True),
    "split-2": Offer(queue_size=2, indirect_desc=False),
    "packed": Offer(packed=True, suspend=True),
    "packed-bare": Offer(packed=True, event_idx=False, indirect_desc=False),
    "packed-2": Offer(packed=True, queue_size=2, in_order=True),
    "packed-3": Offer(packed=True, queue_size=3),
    "packed-7": Offer(packed=True, queue_size=7, indirect_desc=False, suspend=True),
    "packed-1000": Offer(packed=True, queue_size=1000, event_idx=False),
    "polled": Offer(packed=True, poll="on"),
    "not-polled": Offer(poll="off"),
    "everything": Offer(packed=True, in_order=True, notification_data=True, notif_config_data=True, suspend=True),
}


def over(*names: str) -> pytest.MarkDecorator:
    """Run over these offers."""
    return pytest.mark.parametrize("virtio_offer", [RINGS[name] for name in names], ids=names)


every_ring = over(*RINGS)
a_queue_of_one = pytest.mark.parametrize(
    "virtio_offer",
    [Offer(queue_size=1), Offer(packed=True, queue_size=1), Offer(packed=True, queue_size=1, in_order=True)],
    ids=["split-1", "packed-1", "in-order-1"],
)
# Over QEMU the same messages come from another client: that is seen with one kind of ring in test_blk.py, and below.
quick = pytest.mark.virtio_carriers("loopback", "socket", "socket-private", "libvfio-user")


@quick
@pytest.mark.diagonal("virtio_offer", "virtio_carrier")
class TestDisk:
    @pytest.fixture
    def virtio_device(self) -> Blk:
        return Blk(backend=RamBackend(len(CONTENT), CONTENT), num_queues=2)

    @every_ring
    async def test_what_was_offered_is_used(self, virtio_guest: VirtioDevice, virtio_offer: Offer) -> None:
        ours = ~(Feature.VERSION_1.mask - 1 & ~Feature.INDIRECT_DESC.mask & ~Feature.EVENT_IDX.mask)
        assert virtio_guest.features & ours == virtio_offer.features
        for vq in virtio_guest.virtqueues.values():
            assert isinstance(vq, PackedVirtqueue if virtio_offer.packed else SplitVirtqueue)
            assert vq.size == min(virtio_offer.queue_size or 256, 256)

    @every_ring
    async def test_many_at_a_time(self, virtio_guest: VirtioDevice) -> None:
        disk: Disk = virtio_guest.driver_data
        await swap_all(disk)
        assert await disk.read(0, SECTORS) == SWAPPED
        await disk.write(0, CONTENT)
        assert await disk.read(0, SECTORS) == CONTENT

    @over("bare", "split-2", "packed-3", "everything")
    async def test_queues_that_are_resized_under_way(self, virtio_guest: VirtioDevice, virtio_offer: Offer) -> None:
        """RING_RESET of a queue that is in use: what was under way is asked for again (2.6.1)."""
        disk: Disk = virtio_guest.driver_data
        sizes = (2, 5, 1000) if virtio_offer.packed else (2, 1, 4)
        under_way: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_again_and_again, disk)
            for size in sizes:
                for queue in disk.queues:
                    with trio.move_on_after(0.02):  # one that is idle at this moment may be busy at the next
                        while not queue.vq.num_in_flight:
                            await trio.lowlevel.checkpoint()
                    under_way.append(queue.vq.num_in_flight)
                    await queue.resize(max(2, size))
        assert any(under_way)
        assert await disk.read(0, SECTORS) == SWAPPED

    @over(*(name for name, offer in RINGS.items() if offer.suspend))
    async def test_suspended_under_way(self, virtio_guest: VirtioDevice) -> None:
        disk: Disk = virtio_guest.driver_data
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swap_all, disk)
            for _ in range(5):
                await virtio_guest.suspend()
                await trio.sleep(0.001)
                await virtio_guest.resume()
        assert await disk.read(0, SECTORS) == SWAPPED


@quick
class TestConsole:
    @pytest.fixture
    def virtio_device(self) -> HostedConsole:
        return HostedConsole("", "org.example")

    @over("in-order", "packed", "packed-2", "everything")
    async def test_bytes_both_ways(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        await converse(virtio_guest, virtio_device)

    @a_queue_of_one
    async def test_one_buffer_at_a_time(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        await converse(virtio_guest, virtio_device)


@quick
class TestEntropy:
    @pytest.fixture
    def virtio_device(self) -> Rng:
        return Rng()

    @a_queue_of_one
    async def test_one_buffer_at_a_time(self, virtio_guest: VirtioDevice) -> None:
        for size in (1, 4096, 5000, 17):
            assert len(await virtio_guest.driver_data.read(size)) == size


@pytest.mark.virtio_carriers("qtest", "qtest-private")
class TestThroughQemu:
    @pytest.fixture
    def virtio_device(self) -> Blk:
        return Blk(backend=RamBackend(len(CONTENT), CONTENT))

    @over("packed-7", "everything")
    async def test_a_disk(self, virtio_guest: VirtioDevice) -> None:
        disk: Disk = virtio_guest.driver_data
        await disk.write(3, CONTENT[: 8 * SECTOR])
        assert (
            await disk.read(0, 16) == CONTENT[: 3 * SECTOR] + CONTENT[: 8 * SECTOR] + CONTENT[11 * SECTOR : 16 * SECTOR]
        )


STEP = SECTORS // 64
PLACES = range(0, SECTORS, STEP)
SWAPPED = b"".join(
    CONTENT[at * SECTOR : (at + 4) * SECTOR][::-1] + CONTENT[(at + 4) * SECTOR : (at + STEP) * SECTOR] for at in PLACES
)


async def swap_all(disk: Disk) -> None:
    """Many tasks: each reads its place, and writes something else there."""

    async def swap(sector: int) -> None:
        before = await disk.read(sector, 4)
        await disk.write(sector, before[::-1])
        assert await disk.read(sector, 4) == before[::-1]

    async with trio.open_nursery() as nursery:
        for sector in PLACES:
            nursery.start_soon(swap, sector)


async def write_again_and_again(disk: Disk) -> None:
    """Whatever is done twice has the same end."""

    async def write(sector: int) -> None:
        data = SWAPPED[sector * SECTOR : (sector + STEP) * SECTOR]
        for _ in range(4):
            await disk.write(sector, data)
            assert await disk.read(sector, STEP) == data

    async with trio.open_nursery() as nursery:
        for sector in PLACES:
            nursery.start_soon(write, sector)


async def converse(device: VirtioDevice, hosted: HostedConsole) -> None:
    """Through both ports at once."""
    console = device.driver_data

    async def one(number: int) -> None:
        port = await console.wait_port(number)
        await port.open()
        await port.wait_for(lambda port: port.host_open)
        await talk(port, hosted.streams[number])

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(one, number)
