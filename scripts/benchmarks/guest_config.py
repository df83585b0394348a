"""Benchmark of PCI config space through QEMU: a Linux guest reads registers of ours and of libvfio-user's sample."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import trio

from benchmarks import fio
from benchmarks.libvfio_user import listening
from benchmarks.measure import Options, Row, at_most, turn
from benchmarks.server import server
from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device


def read_through_qemu(options: Options, sample: Path) -> Row:
    """Time of one 4-byte read, by fio from sysfs."""
    return trio.run(_read_through_qemu, options, sample)


async def _read_through_qemu(options: Options, sample: Path) -> Row:
    options.progress("config space through QEMU")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        socket = folder / "theirs.sock"
        running = stack.enter_context(server(["blk,size=1M"]))
        stack.enter_context(listening([str(sample), str(socket)], socket))
        devices = [
            dict(qemu_device("ours", running.paths[0]), addr="0x8"),
            dict(qemu_device("theirs", str(socket)), addr="0x9"),
        ]
        image = fio.image_with_fio(vm.guest_image(), folder)
        figures: dict[str, list[float]] = {"ours": [], "libvfio-user": []}
        slots = dict(zip(figures, ("08", "09"), strict=True))
        async with vm.boot_guest(vm.find_qemu(), image, devices=devices, memory_size="1G") as guest:
            for number in range(options.rounds):
                for name in turn(list(figures), number):
                    figures[name].append(await _read(guest, slots[name], 0.1 if options.quick else 0.5))
    ours = figures.pop("ours")
    targets = {"libvfio-user": at_most(1.15)}
    return Row(metric="config read by a guest, through QEMU", unit="us", ours=ours, theirs=figures, targets=targets)


async def _read(guest: vm.Guest, slot: str, seconds: float) -> float:
    # The first 12 bytes: QEMU answers for parts of those after them by itself.
    words = "--ioengine=psync --rw=read --bs=4 --size=12 --readonly --allow_file_create=0 --invalidate=0"
    command = f"{fio.PREFIX} --runtime={round(seconds * 1e3)}ms {words} --name=config"
    output = (await guest.run(f"{command} --filename=/sys/bus/pci/devices/0000\\\\:00\\\\:{slot}.0/config")).output
    return 1e6 / fio.results(fio.FioLoad("read", 4, 1), output)["config"].per_second
