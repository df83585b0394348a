"""A driver in user space of a Linux guest, over vfio-pci behind the guest's IOMMU, for a device of one's own."""

import hashlib
import logging
from pathlib import Path
from typing import Literal

import pytest
import trio
from pci.accelerator import Accelerator
from support import gallery, vfio_accelerator

from vfiouser_virtio import serve, vm

pytestmark = [pytest.mark.qemu, pytest.mark.once]


@pytest.mark.parametrize("memory", ["shared", pytest.param("private", marks=pytest.mark.variant)])
async def test_a_driver_in_user_space_behind_an_iommu(
    memory: Literal["shared", "private"], qemu: vm.Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DMA at addresses that only its IOMMU knows, MSI-X as an eventfd, a reset; what it has not mapped is no memory."""
    image = await trio.to_thread.run_sync(
        lambda: vfio_accelerator.image_with_perl(
            vm.guest_image(more_modules=["vfio_iommu_type1", "vfio_pci"]), tmp_path
        )
    )
    async with (
        serve(Accelerator()) as served,
        vm.boot_guest(
            qemu,
            image,
            devices=served.qemu_devices,
            memory=memory,
            extra_args=["-device", "intel-iommu,caching-mode=on,intremap=on"],
            append="intel_iommu=on iommu.strict=1",
        ) as guest,
    ):
        result = await guest.run(f"set -e\n{gallery.FIND}\n{vfio_accelerator.SCRIPT}", timeout=120, check=True)
        assert result.output.splitlines() == [
            "status 1 head 1 result 1",
            f"digest {hashlib.sha256(b'vfio' * 1000).hexdigest()}",
            "status 2 head 1 result 0",
            "reset 0",
            "status 1 head 1 result 1",
            "unmapped 2",
        ]
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len([each for each in said if "the ring stands still until it is reset" in each]) == 2, said
