"""Machines whose firmware boots from our network device: iPXE under SeaBIOS, and OVMF's own driver."""

from pathlib import Path

import pytest
from support.net_boot import HELLO, boot_folder

from vfiouser_virtio import serve, vm

pytestmark = pytest.mark.qemu
PATIENCE = 300


async def hello(guest: vm.Guest) -> None:
    """Linux was loaded, has had a lease and a file of its own, and ended."""
    await guest.wait_serial(HELLO, timeout=PATIENCE)
    assert await guest.wait_exit(timeout=PATIENCE) == 0
    assert not guest.qemu_stderr


async def test_ipxe_loads_linux(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = boot_folder(tmp_path / "tftp", guest_image.kernel)
    async with serve(f"net,netdev=boot,tftp={folder},bootfile=boot.ipxe") as served:
        (device,) = served.qemu_devices
        boots = {**device, "romfile": "pxe-virtio.rom", "bootindex": 0}
        async with vm.boot_guest(qemu, None, devices=[boots], machine="q35,graphics=off") as guest:
            await hello(guest)
    assert not caplog.records
