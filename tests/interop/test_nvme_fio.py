"""fio, which compares what it reads with what it has written, on examples/pci/nvme.py over resets of the controller."""

import shlex
from pathlib import Path

import pytest
import trio
from benchmarks import fio
from support.amounts import Amounts
from support.command import serve_process
from support.vm_devices import MIB, sparse

from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device

pytestmark = [pytest.mark.qemu, pytest.mark.once, pytest.mark.variant]

NVME = Path(__file__).parents[2] / "examples/pci/nvme.py"
# It ends at the first piece that is not what it has written, or that is an error, and says so.
LOAD = shlex.join(
    [
        *("fio", "--output=/tmp/out", "--output-format=terse", "--terse-version=3", "--thread", "--eta=never"),
        *("--name=load", "--filename=/dev/nvme0n1", "--ioengine=libaio", "--direct=1", "--iodepth=32"),
        *("--rw=randrw", "--bsrange=4k-64k", "--time_based", "--runtime=99999", "--verify=crc32c", "--verify_fatal=1"),
        *("--verify_backlog=32", "--continue_on_error=none", "--fsync=16"),
    ]
)
SOME = 4 * MIB // 512
PROGRESS = "awk '{ print $3, $7 }' /sys/block/nvme0n1/stat"


async def test_fio_verifies_over_resets(qemu: vm.Qemu, tmp_path: Path, amounts: Amounts) -> None:
    sparse(tmp_path / "disk", 16 * MIB)
    image = fio.image_with_fio(vm.guest_image(more_modules=("nvme",)), tmp_path)
    async with serve_process("--device", f"{NVME}:Nvme,path=disk", folder=tmp_path) as served:
        plugged = [qemu_device("nvme0", served.sockets[0])]
        async with vm.boot_guest(qemu, image, devices=plugged, cpus=2) as guest:
            await guest.run("until [ -e /dev/nvme0n1 ]; do sleep 0.1; done", check=True, timeout=120)
            load = f"set +e; {LOAD} >/tmp/complaints 2>&1 & echo $! >/tmp/pid; wait $!; echo >/tmp/ended"
            await guest.run(f"({load}) >/dev/null 2>&1 &", check=True)
            await goes_on(guest)
            for _ in range(amounts.gallery_rebinds):
                await guest.run("echo 1 >/sys/class/nvme/nvme0/reset_controller", check=True, timeout=120)
                await goes_on(guest)
            assert await complaints(guest) == ""
            await guest.run("kill -KILL $(cat /tmp/pid); until [ -e /tmp/ended ]; do sleep 0.1; done", check=True)
            assert (await guest.run("dmesg | grep -iE 'i/o error|oops:|bug:' || true")).output == ""
        assert await served.terminate() == 0


async def goes_on(guest: vm.Guest) -> None:
    """Return when `SOME` sectors more have been read, and written. Raises AssertionError when fio has ended."""
    before = await progress(guest)
    with trio.fail_after(300):
        while not all(new > old + SOME for new, old in zip(await progress(guest), before, strict=True)):
            assert await complaints(guest) == ""
            await trio.sleep(0.1)


async def complaints(guest: vm.Guest) -> str:
    """What fio has said, if it has ended."""
    return (await guest.run("[ ! -e /tmp/ended ] || cat /tmp/out /tmp/complaints", check=True)).output


async def progress(guest: vm.Guest) -> list[int]:
    """How many sectors have been read, and written; those of a request that a reset has ended count later."""
    return [int(number) for number in (await guest.run(PROGRESS, check=True)).output.split()]
