"""Benchmark of an NVMe controller in a Linux guest: examples/pci/nvme.py beside QEMU's own, on the same file."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import trio

from benchmarks import fio
from benchmarks.fio import FioLoad
from benchmarks.guest_disks import BUILT_IN, OURS, GuestDevice, in_slots, make_image
from benchmarks.guest_io import measure_disks
from benchmarks.measure import Benchmark, Options, Row, Target, at_least
from benchmarks.server import server
from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device
from vfiouser_virtio.vm.debian import cache_dir

DEVICE = Path(__file__).parents[2] / "examples" / "pci" / "nvme.py"

LOADS: dict[FioLoad, Target] = {
    FioLoad("randread", 4, 1): at_least(0.8),
    FioLoad("randread", 4, 32): at_least(0.8),
    FioLoad("randwrite", 4, 1): at_least(0.8),
    FioLoad("randwrite", 4, 32): at_least(0.8),
    FioLoad("read", 128, 8): at_least(0.8),
}


def run(options: Options) -> list[Row]:
    """Boot one guest with both controllers, and measure in it."""
    return trio.run(_run, options)


async def _run(options: Options) -> list[Row]:
    options.progress("files and servers")
    with ExitStack() as stack:
        # Not /tmp, which may be in memory: there RWF_NOWAIT is not known, for one.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache_dir())))
        image = make_image(folder / "disk")
        running = stack.enter_context(server([f"{DEVICE}:Nvme,path={image},serial={OURS}"]))
        node = f"driver=file,node-name=built-in,locking=off,filename={image}"
        disks = [
            GuestDevice(OURS, dict(qemu_device(OURS, running.paths[0])), usage=running.usage),
            GuestDevice(BUILT_IN, f"nvme,drive=built-in,serial={BUILT_IN}", ("-blockdev", node)),
        ]
        guest_image = fio.image_with_fio(vm.guest_image(more_modules=("nvme",)), folder)
        options.progress("boot")
        async with vm.boot_guest(
            vm.find_qemu(),
            guest_image,
            devices=in_slots(disks),
            memory_size="1G",
            extra_args=[argument for disk in disks for argument in disk.arguments],
        ) as guest:
            paths = await _find(guest)
            return await measure_disks(guest, options, disks, paths, LOADS, LOADS)


async def _find(guest: vm.Guest) -> dict[str, str]:
    """The guest's device file of each controller's namespace, by serial number."""
    await guest.run("for try in $(seq 100); do [ -e /dev/nvme1n1 ] && break; sleep 0.1; done")
    listed = await guest.run("for each in /sys/class/nvme/*; do echo $(cat $each/serial) ${each##*/}; done", check=True)
    found = dict(line.split() for line in listed.output.splitlines())
    if set(found) != {OURS, BUILT_IN}:
        raise vm.VmError(f"the guest has other controllers than it should: {found}")
    return {name: f"/dev/{found[name]}n1" for name in (OURS, BUILT_IN)}


BENCHMARK = Benchmark(name="nvme", summary="an NVMe controller inside a Linux guest, beside QEMU's own", run=run)
