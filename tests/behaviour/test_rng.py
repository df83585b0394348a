"""The entropy device as its driver has it, over every carrier."""

from pathlib import Path

import pytest

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import VirtioDevice
from vfiouser_virtio.guest.drivers import Entropy

SEED = bytes(range(251))


@pytest.fixture
def virtio_device(tmp_path: Path) -> Rng:
    """One that gives known bytes, over and over."""
    (tmp_path / "seed").write_bytes(SEED)
    return Rng(source=tmp_path / "seed")


async def test_bytes_come_in_order(virtio_guest: VirtioDevice) -> None:
    entropy: Entropy = virtio_guest.driver_data
    expected = SEED * 40
    assert await entropy.read(1) == expected[:1]
    assert await entropy.read(4095) == expected[1:4096]
    assert await entropy.read(5000) == expected[4096:9096]


@pytest.mark.virtio_carriers("socket", "socket-private", "qtest", "libvfio-user")
# The other pairs are in test_blk.py.
@pytest.mark.parametrize(
    ("virtio_ids", "virtio_interrupts"),
    [("default", "intx"), ("default", "poll"), ("2007", "msix"), ("2007", "poll"), ("qemu", "intx")],
)
async def test_every_identity_and_interrupt(virtio_guest: VirtioDevice, virtio_ids: str) -> None:
    vendors = {"default": (0x1AF4, 0x5000), "2007": (0x5000, 0x5000), "qemu": (0x1AF4, 0x1AF4)}[virtio_ids]
    assert (virtio_guest.ids.vendor, virtio_guest.ids.subsystem_vendor) == vendors
    for size in (16, 100, 1):
        assert len(await virtio_guest.driver_data.read(size)) == size
