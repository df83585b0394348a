"""SeaBIOS' own virtio driver on our disk, while QEMU remaps RAM under its ring; QEMUs that come, go and are killed."""

import gc
import logging
import os
from pathlib import Path
from typing import Literal

import pytest
import trio
from pci.nvme import Nvme
from support.boot_sector import GREETING, SECTORS, WRITE_SECTOR, boot_sector
from support.engines import current_engine
from support.serving import serving_functions

from vfiouser_virtio import Serving, serve, vm
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.transports import VirtioPci

pytestmark = pytest.mark.qemu
both_engines = pytest.mark.usefixtures("engine")


@pytest.fixture
def boot_disk(tmp_path: Path) -> Path:
    """A disk that boots, and has numbered sectors behind that."""
    disk = tmp_path / "boot.img"
    sectors = b"".join(number.to_bytes(4, "little") * 128 for number in range(1, 2048))
    disk.write_bytes(boot_sector() + sectors)
    os.truncate(disk, 16 << 20)
    return disk


@pytest.mark.diagonal("machine", "memory")
@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("memory", ["shared", "private"])
async def test_firmware_boots_from_our_disk(
    qemu: vm.Qemu, boot_disk: Path, machine: str, memory: Literal["shared", "private"]
) -> None:
    async with (
        serve(f"blk,path={boot_disk}") as served,
        vm.boot_guest(qemu, None, devices=served.qemu_devices, machine=machine, memory=memory) as guest,
    ):
        await guest.wait_serial(GREETING.decode() + 8 * ".")
        guest.kill()
        await guest.wait_exit()
    assert "!" not in guest.serial_log
    # What was read with the firmware's driver was written with it.
    written = boot_disk.read_bytes()[WRITE_SECTOR * 512 :][: SECTORS * 512]
    numbers = {int.from_bytes(written[at : at + 4], "little") for at in range(512, len(written), 512)}
    assert len(numbers) == SECTORS - 1
    assert max(numbers) - min(numbers) == SECTORS - 2


async def test_firmware_boots_from_an_nvme_disk(
    qemu: vm.Qemu, boot_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SeaBIOS' nvme driver on examples/pci/nvme.py, which it polls."""
    nvme = Nvme(path=boot_disk)
    async with (
        serve(nvme) as served,
        vm.boot_guest(qemu, None, devices=served.qemu_devices) as guest,
    ):
        await guest.wait_serial(GREETING.decode() + 4 * ".")
        guest.kill()
        await guest.wait_exit()
    assert "!" not in guest.serial_log
    written = boot_disk.read_bytes()[WRITE_SECTOR * 512 :][: SECTORS * 512]
    numbers = [int.from_bytes(written[at : at + 4], "little") for at in range(512, len(written), 512)]
    assert numbers == list(range(numbers[0], numbers[0] + SECTORS - 1))
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


@both_engines
async def test_linux_takes_over_a_disk_that_the_firmware_used(
    qemu: vm.Qemu, guest_image: vm.GuestImage, boot_disk: Path
) -> None:
    """Default boot order: SeaBIOS has set up its ring on the disk, and leaves it so while RAM is remapped."""
    activations = []

    class Counting(Blk):
        async def run(self) -> None:
            activations.append(self)
            await super().run()

    function = VirtioPci(Counting(path=boot_disk))
    async with (
        serving_functions(function) as devices,
        vm.boot_guest(qemu, guest_image, devices=devices) as guest,
    ):
        first = await guest.run("dd if=/dev/vda bs=512 count=1 2>/dev/null", check=True)
        assert first.raw_output == boot_sector()
        assert len(activations) == 2, "the firmware's driver, then Linux'"


# test_huge_pages.py and the test with killed QEMUs below have more than one after the other, too.
@pytest.mark.variant
@both_engines
async def test_two_qemus_one_after_the_other(qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    async with serve(f"blk,path={disk}", "rng", engine=current_engine()) as served:
        for turn in (b"first", b"second"):
            async with vm.boot_guest(qemu, guest_image, devices=served.qemu_devices) as guest:
                found = await guest.run("dd if=/dev/vda bs=8 count=1 2>/dev/null", check=True)
                assert found.raw_output == (bytes(8) if turn == b"first" else b"first".ljust(8, b"\0"))
                await guest.run(f"printf {turn.decode()} | dd of=/dev/vda conv=fsync", check=True)
                await guest.run("test $(head -c 32 /dev/hwrng | wc -c) = 32", check=True)
                await guest.poweroff()
    assert disk.read_bytes()[:6] == b"second"


def census() -> dict[str, int]:
    """What a process can leak: file descriptors, mappings, tasks."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        guest_memory = sum("memfd" in line for line in maps)
    fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and _alive(fd)]
    return {"fds": len(fds), "mappings": guest_memory, "tasks": trio.lowlevel.current_statistics().tasks_living}


def _alive(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")  # the one of listdir() itself is not


async def client_left(served: Serving) -> None:
    with trio.fail_after(60):
        while any(function.memory.client for function in served.functions):
            await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked()


async def test_qemu_killed_in_the_middle_of_io(
    qemu: vm.Qemu, guest_image: vm.GuestImage, boot_disk: Path, long_run: bool
) -> None:
    async with serve(f"blk,path={boot_disk},num-queues=2", "rng") as served:
        before: dict[str, int] = {}
        for turn in range(20 if long_run else 9):
            # Mostly the firmware, which is there in a second; now and then a Linux with much I/O.
            linux = turn in (4, 8, 14)
            async with vm.boot_guest(qemu, guest_image if linux else None, devices=served.qemu_devices) as guest:
                if linux:
                    await guest.run(
                        "dd if=/dev/vda of=/dev/null bs=64k iflag=direct && head -c 16 /dev/hwrng", check=True
                    )
                    jobs = "for i in 1 2 3 4; do dd if=/dev/zero of=/dev/vda bs=64k oflag=direct seek=$i & done"
                    await guest.run(f"({jobs}; dd if=/dev/hwrng of=/dev/null) </dev/null >/dev/null 2>&1 &", check=True)
                    await trio.sleep(0.3)
                else:
                    await guest.wait_serial((3 + turn) * ".")
                guest.kill()
                await guest.wait_exit()
            await client_left(served)
            boot_disk.write_bytes(boot_sector() + boot_disk.read_bytes()[512:])  # Linux has overwritten it
            if turn == 4:
                before = census()  # the first Linux may have started what is kept, such as the disk's threads
        after = census()
        # What looks for drivers that never notify may have been on its way when the first Linux was killed.
        assert after.pop("tasks") <= before.pop("tasks")
        assert after == before
        async with vm.boot_guest(qemu, None, devices=served.qemu_devices) as guest:
            await guest.wait_serial(GREETING.decode() + "...")
