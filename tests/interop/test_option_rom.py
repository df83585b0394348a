"""An expansion ROM that SeaBIOS runs and Linux reads; and extended capabilities that Linux finds, all through QEMU."""

from pathlib import Path

import pytest
import trio
from support.option_rom import DEBUG_PORT, option_rom

from vfiouser_virtio import vm
from vfiouser_virtio.pci import Identity, PciFunction, extended_vendor_capability, serial_number_capability
from vfiouser_virtio.vfio_user import Server, listen_path

pytestmark = pytest.mark.qemu

WORDS = b"an option ROM in Python\n"


async def test_firmware_runs_a_rom_and_linux_reads_it(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path
) -> None:
    identity = Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000)
    image = option_rom(identity, WORDS, blocks=5).ljust(4096, b"\xff")
    function = PciFunction(identity, config_size=4096)
    function.add_rom(image)
    function.add_pcie()
    function.add_extended_capability(serial_number_capability(0x0102_0304_0506_0708))
    vendor = function.add_extended_capability(extended_vendor_capability(7, b"ours"))
    path, said = tmp_path / "rom.sock", tmp_path / "said"
    device = {"driver": "vfio-user-pci", "addr": "5", "socket": {"type": "unix", "path": str(path)}}
    debug = ["-chardev", f"file,id=said,path={said}", "-device", f"isa-debugcon,iobase={DEBUG_PORT:#x},chardev=said"]
    with listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(function).serve, listener)
            async with vm.boot_guest(qemu, guest_image, devices=[device], extra_args=debug) as guest:
                place = "cd /sys/bus/pci/devices/0000:00:05.0"
                read = await guest.run(f"{place} && echo 1 >rom && cat rom && echo 0 >rom", check=True)
                config = await guest.run(f"{place} && cat config", check=True)
            nursery.cancel_scope.cancel()
    assert said.read_bytes().count(WORDS) == 1
    # As much of it as its images say: the last one ends here.
    assert read.raw_output[: 5 * 512] == image[: 5 * 512]
    assert len(config.raw_output) == 4096
    assert config.raw_output[0x104:0x10C] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert config.raw_output[vendor + 8 : vendor + 12] == b"ours"
