"""Every file of examples/ does what it says."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.command import environment, run_command

from vfiouser_virtio import serve, vm
from vfiouser_virtio.guest.drivers.blk import RequestFailed
from vfiouser_virtio.protocols.virtio.blk import BlkStatus
from vfiouser_virtio.serving.device_files import load_device_class
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.virtio import Device

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {
    "dice.py", "failing_disk.py", "thermometer.py", "test_thermometer.py", "scratch_pci.py",
    "i2c_board.py", "pci/accelerator.py", "pci/idio16.py", "pci/ismt.py", "pci/uart.py",
    "chips/at24.py", "chips/bmp280.py", "chips/buses.py", "chips/lm75.py",
    "pci/edu.py", "pci/edu_driver.py", "rtl/copier_card.py", "rtl/copier_simulation.py", "rtl/simulate.py",
    "pci/nvme.py", "pci/nvme_admin.py", "pci/nvme_engine.py", "pci/nvme_features.py", "pci/nvme_formats.py",
    "pci/nvme_io.py", "pci/nvme_queues.py", "pci/nvme_shadow.py",
    "pci/e1000.py", "pci/e1000_banks.py", "pci/e1000_receive.py", "pci/e1000_serial.py", "pci/e1000_transmit.py",
}  # fmt: skip


def example(what: str, **options: Any) -> Device:
    make: Callable[..., AnyDevice] = load_device_class(str(EXAMPLES / what))
    device = make(**options)
    assert isinstance(device, Device)
    return device


def test_all_examples_are_tested_and_listed() -> None:
    files = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert files == TESTED
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in files)


async def test_dice() -> None:
    async with carry(example("dice.py:Dice", sides=3), "socket") as device:
        thrown = await device.driver_data.read(300)
        assert set(thrown) == set(b"123")


async def test_a_failing_disk_fails_where_it_is_said_to() -> None:
    async with carry(example("failing_disk.py:FailingDisk", first=8, count=2), "socket") as device:
        disk = device.driver_data
        await disk.write(0, b"x" * 16 * 512)
        assert await disk.read(0, 8) == b"x" * 8 * 512
        assert await disk.read(10, 6) == b"x" * 6 * 512
        for sector in (8, 9):
            with pytest.raises(RequestFailed) as failed:
                await disk.read(sector, 1)
            assert failed.value.status == BlkStatus.IOERR


@pytest.mark.parametrize("name", ["dice", "failing_disk", "thermometer"])
def test_a_device_file_is_a_command(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "no-such-option"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert ended.returncode == 2
    assert f'{name}.py: no option "no-such-option"' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_thermometer() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "-o",
        "trio_mode=true",
    ]
    ended = subprocess.run(
        [*command, "--rootdir", str(EXAMPLES), str(EXAMPLES / "test_thermometer.py")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 passed" in ended.stdout


def test_scratch_pci_is_seen_by_probe(tmp_path: Path) -> None:
    path = tmp_path / "scratch.sock"
    command = [sys.executable, str(EXAMPLES / "scratch_pci.py"), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == f"ready {path}\n"
            seen = run_command("probe", str(path))
        finally:
            server.terminate()
    assert seen.returncode == 0, seen.stderr
    assert "1234:5678" in seen.stdout


@pytest.mark.qemu
async def test_linux_has_dice_and_a_bad_sector(virtio_qemu: vm.Qemu, virtio_guest_image: vm.GuestImage) -> None:
    devices = [f"{EXAMPLES}/dice.py:Dice,sides=2", f"{EXAMPLES}/failing_disk.py:FailingDisk,first=8,count=8"]
    async with serve(*devices) as served:
        arguments = [endpoint.qemu_device for endpoint in served.endpoints]
        async with vm.boot_guest(
            virtio_qemu, virtio_guest_image, devices=[each for each in arguments if each]
        ) as guest:
            thrown = (await guest.run("head -c 64 /dev/hwrng", check=True)).raw_output
            assert set(thrown) == set(b"12")
            result = await guest.run(
                "dd if=/dev/vda of=/dev/null bs=4k count=1 && dd if=/dev/vda of=/dev/null bs=4k skip=1"
            )
            assert "error" in result.output
            assert (await guest.run("dd if=/dev/vda of=/dev/null bs=4k skip=2 count=1")).status == 0
