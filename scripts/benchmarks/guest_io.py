"""Benchmark inside a Linux guest: the same loads on our disk, on QEMU's own and on qemu-storage-daemon's, in turn.

All are attached to one guest at the same time and have the same file, whose content is in the host's page cache, so
that what is compared is the way to the host and back.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio

from benchmarks import fio
from benchmarks.fio import FioLoad
from benchmarks.guest_console import CONSOLE_OUTPUT, console_output, guest_consoles
from benchmarks.guest_disks import BUILT_IN, OURS, VHOST_USER, GuestDevice, guest_disks, in_slots
from benchmarks.measure import Benchmark, Options, Row, Target, at_least, at_most, turn
from vfiouser_virtio import vm
from vfiouser_virtio.vm.debian import cache_dir

# What is asked for beside QEMU's own device; beside the storage daemon, it is no less anywhere.
LOADS: dict[FioLoad, Target] = {
    FioLoad("read", 128, 1): at_least(0.95),
    FioLoad("read", 128, 8): at_least(0.95),
    FioLoad("read", 1024, 1): at_least(0.95),
    FioLoad("randread", 4, 1): at_least(0.95),
    FioLoad("randread", 4, 32): at_least(1.0),
    FioLoad("write", 128, 1): at_least(0.9),
    FioLoad("write", 1024, 1): at_least(0.9),
    FioLoad("randwrite", 4, 1): at_least(0.9),
    FioLoad("randwrite", 4, 32): at_least(0.9),
}

# fio, its libraries and its buffers.
_MEMORY = "1G"

Figures = dict[FioLoad, dict[str, list[float]]]


def run(options: Options) -> list[Row]:
    """Boot one guest and measure in it."""
    return trio.run(_run, options)


async def _run(options: Options) -> list[Row]:
    options.progress("files and servers")
    with ExitStack() as stack:
        # Not /tmp, which may be in memory: there RWF_NOWAIT is not known, for one.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache_dir())))
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        disks = guest_disks(options, folder, sockets, stack)
        consoles = guest_consoles(folder, stack)
        image = fio.image_with_fio(vm.guest_image(), folder)
        options.progress("boot")
        async with vm.boot_guest(
            vm.find_qemu(),
            image,
            devices=[*in_slots(disks), *(console.device for console in consoles)],
            memory_size=_MEMORY,
            extra_args=[argument for device in [*disks, *consoles] for argument in device.arguments],
        ) as guest:
            paths = await find_disks(guest, disks, (OURS, BUILT_IN))
            rows = await measure_disks(guest, options, disks, paths, LOADS)
            if options.wants(CONSOLE_OUTPUT):
                options.progress(CONSOLE_OUTPUT)
                rows.append(await console_output(guest, folder, options))
            return rows


async def find_disks(guest: vm.Guest, disks: Sequence[GuestDevice], named: Sequence[str]) -> dict[str, str]:
    """The guest's device file of each disk. Linux and QEMU go by the order on the bus; ``named`` are checked."""
    listed = await guest.run("cd /sys/block; for d in *; do readlink -f $d; done | grep /pci | sort", check=True)
    names = [path.rpartition("/")[2] for path in listed.output.split()]
    if len(names) != len(disks):
        raise vm.VmError(f"the guest has {len(names)} disks ({' '.join(names)}) where QEMU has {len(disks)}")
    found = {disk.name: f"/dev/{name}" for disk, name in zip(disks, names, strict=True)}
    serials = (await guest.run(f"cat {' '.join(_serial(found[name]) for name in named)}", check=True)).output
    assert serials == "".join(named), serials
    return found


def _serial(disk: str) -> str:
    return f"/sys/block/{disk.rpartition('/')[2]}/serial"


async def measure_disks(
    guest: vm.Guest,
    options: Options,
    disks: Sequence[GuestDevice],
    paths: Mapping[str, str],
    loads: Iterable[FioLoad],
    targets: Mapping[FioLoad, Target] = LOADS,
) -> list[Row]:
    """Speed under each load that is wanted, and the CPU time that the servers use for a request.

    ``targets`` are those beside QEMU's own device.
    """
    loads = [load for load in loads if options.wants(load.name)]
    speed: Figures = {load: defaultdict(list) for load in loads}
    cpu: Figures = {load: defaultdict(list) for load in loads}
    seconds = 0.2 if options.quick else 0.5
    # A disk's first requests are not like the others.
    await guest.run(fio.command(FioLoad("read", 1024, 1), paths, list(paths), 0.1), check=True)
    for number in range(options.rounds):
        for load in loads:
            options.progress(f"{load.name}, round {number + 1}")
            used = {disk.name: disk.usage.cpu_s for disk in disks if disk.usage}
            command = fio.command(load, paths, turn(list(paths), number), seconds)
            found = fio.results(load, (await guest.run(command, check=True)).output)
            for disk in disks:
                result = found[disk.name]
                speed[load][disk.name].append(_figure(load, result.per_second))
                if disk.usage:
                    # The others' time is in it too: one that is not asked for anything must not use any.
                    used_s = disk.usage.cpu_s - used[disk.name]
                    cpu[load][disk.name].append(used_s * 1e6 / max(result.requests, 1))
    return [*_speed_rows(speed, targets), *_cpu_rows(cpu)] if loads else []


def _figure(load: FioLoad, per_second: float) -> float:
    """Small requests are counted, those of large ones are weighed: thousand or 10^6 bytes per second."""
    return per_second / 1e3 if load.block_kib < 64 else per_second * load.block_kib * 1024 / 1e6


def _speed_rows(speed: Figures, targets: Mapping[FioLoad, Target]) -> list[Row]:
    return [
        _row(
            load.name,
            "k/s" if load.block_kib < 64 else "MB/s",
            figures,
            {BUILT_IN: targets[load], VHOST_USER: at_least(1.0)},
        )
        for load, figures in speed.items()
    ]


def _cpu_rows(cpu: Figures) -> list[Row]:
    rows = [_row(f"server CPU per request, {load.name}", "us", figures, {}) for load, figures in cpu.items()]
    names = list(next(iter(cpu.values())))
    # Each load counts alike, though a request of 1 MiB costs a hundred of the small ones.
    means = {
        name: [
            math.exp(sum(map(math.log, each)) / len(each))
            for each in zip(*(figures[name] for figures in cpu.values()), strict=True)
        ]
        for name in names
    }
    return [*rows, _row("server CPU per request, geometric mean", "us", means, {VHOST_USER: at_most(1.0)})]


def _row(metric: str, unit: str, figures: Mapping[str, list[float]], targets: Mapping[str, Target]) -> Row:
    theirs = {name: those for name, those in figures.items() if name != OURS}
    return Row(metric=metric, unit=unit, ours=figures[OURS], theirs=theirs, targets=targets)


BENCHMARK = Benchmark(name="guest-io", summary="disks inside a Linux guest, beside QEMU's own and vhost-user", run=run)
