"""Disks as their driver has them, over every carrier."""

import os
from pathlib import Path

import pytest
import trio

from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.guest import VirtioDevice
from vfiouser_virtio.guest.drivers import Disk, RequestFailed
from vfiouser_virtio.guest.pci_transport import PciTransport
from vfiouser_virtio.protocols.virtio.blk import BlkStatus, RequestType
from vfiouser_virtio.protocols.virtio.features import Feature

SECTOR = 512
SECTORS = 8192  # 4 MiB
CONTENT = os.urandom(SECTORS * SECTOR)

on_pci = pytest.mark.virtio_carriers("socket", "socket-private", "qtest", "libvfio-user")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def virtio_device(image: Path) -> Blk:
    return Blk(path=image, serial="a disk", num_queues=2)


@pytest.fixture
async def disk(virtio_guest: VirtioDevice) -> Disk:
    driven: Disk = virtio_guest.driver_data
    return driven


async def test_what_is_written_is_read_and_in_the_file(disk: Disk, image: Path) -> None:
    assert await disk.capacity() == SECTORS
    assert await disk.get_id() == b"a disk"
    assert await disk.read(7, 3) == CONTENT[7 * SECTOR : 10 * SECTOR]
    assert await disk.read(0, SECTORS) == CONTENT
    data = os.urandom(1 << 20)
    await disk.write(100, data)
    await disk.write(SECTORS - 1, b"\xaa" * SECTOR)
    await disk.flush()
    expected = bytearray(CONTENT)
    expected[100 * SECTOR : 100 * SECTOR + len(data)] = data
    expected[-SECTOR:] = b"\xaa" * SECTOR
    assert await disk.read(0, SECTORS) == expected
    assert image.read_bytes() == expected


async def test_many_at_a_time(disk: Disk) -> None:
    found = {}

    async def swap(sector: int) -> None:
        """Each task reads its place, writes something else there, and reads it again."""
        before = await disk.read(sector, 4)
        await disk.write(sector, before[::-1])
        found[sector] = await disk.read(sector, 4)

    sectors = range(0, SECTORS, SECTORS // 100)
    async with trio.open_nursery() as nursery:
        for sector in sectors:
            nursery.start_soon(swap, sector)
    assert found == {at: CONTENT[at * SECTOR : (at + 4) * SECTOR][::-1] for at in sectors}


async def test_zeros(disk: Disk, image: Path) -> None:
    await disk.write_zeroes(8, 8)
    await disk.write_zeroes(800, 16, unmap=True)
    await disk.discard(2048, 2048)
    await disk.flush()
    written = image.read_bytes()
    assert written[8 * SECTOR : 16 * SECTOR] == bytes(8 * SECTOR)
    assert written[800 * SECTOR : 816 * SECTOR] == bytes(16 * SECTOR)
    assert written[2048 * SECTOR : 4096 * SECTOR] == bytes(2048 * SECTOR)
    assert await disk.read(7, 10) == written[7 * SECTOR : 17 * SECTOR]
    assert written[: 8 * SECTOR] == CONTENT[: 8 * SECTOR]


async def test_what_cannot_be_done_is_refused_and_harms_nothing(disk: Disk) -> None:
    with pytest.raises(RequestFailed) as caught:
        await disk.read(SECTORS - 1, 2)
    assert caught.value.status == BlkStatus.IOERR
    with pytest.raises(RequestFailed):
        await disk.write(SECTORS, bytes(SECTOR))
    assert (await disk.request(77)).status == BlkStatus.UNSUPP
    assert (await disk.request(RequestType.IN, 0, in_len=SECTOR - 1)).status == BlkStatus.IOERR
    assert await disk.read(SECTORS - 1, 1) == CONTENT[-SECTOR:]


class TestReadOnly:
    @pytest.fixture
    def virtio_device(self) -> Blk:
        return Blk(backend=RamBackend(1 << 20, CONTENT[:SECTOR], readonly=True))

    async def test_it_says_so_and_stays_as_it_is(self, disk: Disk) -> None:
        assert disk.readonly
        assert (await disk.request(RequestType.OUT, 0, bytes(SECTOR))).status == BlkStatus.IOERR
        assert await disk.read(0, 1) == CONTENT[:SECTOR]


async def test_a_live_resize(disk: Disk, virtio_device: Blk, image: Path) -> None:
    told = trio.Event()
    disk.device.on_config = told.set
    os.truncate(image, 2 * len(CONTENT))
    await told.wait()
    assert await disk.capacity() == 2 * SECTORS
    assert await disk.read(2 * SECTORS - 1, 1) == bytes(SECTOR)


@on_pci
# The other pairs are in test_rng.py: what identity a device has and how it interrupts is the same for all of them.
@pytest.mark.parametrize(
    ("virtio_ids", "virtio_interrupts"), [("default", "msix"), ("2007", "intx"), ("qemu", "poll"), ("qemu", "msix")]
)
async def test_every_identity_and_interrupt(disk: Disk, virtio_ids: str, virtio_interrupts: str) -> None:
    assert isinstance(disk.device.transport, PciTransport)
    assert disk.device.transport.interrupts == virtio_interrupts
    assert disk.device.ids.class_code == (0x010000 if virtio_ids == "qemu" else 0x018000)
    await disk.write(5, CONTENT[:4096])
    assert await disk.read(4, 9) == CONTENT[4 * SECTOR : 5 * SECTOR] + CONTENT[:4096]


@pytest.mark.parametrize(
    "virtio_feature_mask", [~feature.mask for feature in (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET)]
)
async def test_a_driver_that_knows_less(disk: Disk, virtio_feature_mask: int) -> None:
    assert disk.device.offered & ~virtio_feature_mask
    assert not disk.device.features & ~virtio_feature_mask
    assert await disk.read(0, 64) == CONTENT[: 64 * SECTOR]
