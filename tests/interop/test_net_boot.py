"""Machines whose firmware boots from our network device: iPXE under SeaBIOS, and OVMF's own driver."""

import shutil
from pathlib import Path

import pytest
from support.net_boot import HELLO, PAYLOAD, boot_folder
from support.unified_kernel import unified_kernel

from vfiouser_virtio import serve, vm
from vfiouser_virtio.audit.findings import AuditLog
from vfiouser_virtio.vm.command_line import BASE_APPEND

pytestmark = pytest.mark.qemu
PATIENCE = 300


async def hello(guest: vm.Guest) -> None:
    """Linux was loaded, has had a lease and a file of its own, and ended."""
    await guest.wait_serial(HELLO, timeout=PATIENCE)
    assert await guest.wait_exit(timeout=PATIENCE) == 0
    assert not guest.qemu_stderr


@pytest.mark.variant
async def test_ipxe_loads_linux(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = boot_folder(tmp_path / "tftp", guest_image.kernel)
    audit = AuditLog()
    async with serve(f"net,netdev=boot,tftp={folder},bootfile=boot.ipxe", audit=audit) as served:
        (device,) = served.qemu_devices
        boots = {**device, "romfile": "pxe-virtio.rom", "bootindex": 0}
        async with vm.boot_guest(qemu, None, devices=[boots], machine="q35,graphics=off") as guest:
            await hello(guest)
    assert not caplog.records
    [found] = audit.devices.values()
    assert found.run == 2, "iPXE's driver, then Linux's"
    assert not found.by_rule


async def test_ovmf_loads_ipxe_which_loads_linux(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, long_run: bool
) -> None:
    """OVMF's own driver: DHCP, and iPXE by TFTP; then iPXE by that driver a file, and Linux only in a long run."""
    folder = boot_folder(tmp_path / "tftp", guest_image.kernel)
    shutil.copy(vm.ipxe_program(), folder / "snponly.efi")
    async with serve(f"net,netdev=boot,tftp={folder},bootfile=snponly.efi", "rng") as served:
        net, rng = served.qemu_devices
        devices = [{**net, "bootindex": 0}, rng]
        async with vm.boot_guest(qemu, None, devices=devices, extra_args=vm.ovmf_arguments()) as guest:
            await guest.wait_serial("NBP filename is snponly.efi", timeout=PATIENCE)
            await guest.wait_serial(f"payload : {len(PAYLOAD)} bytes", timeout=PATIENCE)
            await guest.wait_serial("hello from 10.0.2.15", timeout=PATIENCE)
            if long_run:
                await hello(guest)
    assert not caplog.records


@pytest.mark.variant
async def test_ovmf_loads_linux(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing between OVMF's own driver and Linux: the boot file is a unified kernel image."""
    folder = boot_folder(tmp_path / "tftp", guest_image.kernel)
    program = unified_kernel(
        vm.unified_kernel_stub(), folder / "vmlinuz", (folder / "initrd").read_bytes(), BASE_APPEND
    )
    (folder / "linux.efi").write_bytes(program)
    audit = AuditLog()
    async with serve(f"net,netdev=boot,tftp={folder},bootfile=linux.efi", "rng", audit=audit) as served:
        net, rng = served.qemu_devices
        devices = [{**net, "bootindex": 0}, rng]
        async with vm.boot_guest(qemu, None, devices=devices, extra_args=vm.ovmf_arguments()) as guest:
            await guest.wait_serial("NBP filename is linux.efi", timeout=PATIENCE)
            await hello(guest)
    assert not caplog.records
    for found in audit.devices.values():
        assert set(found.by_rule) == {"status/reset-wait"}, "OVMF's drivers do not wait for the end of a reset"
        assert found.run not in found.by_rule["status/reset-wait"].runs, "the last run is Linux's"
