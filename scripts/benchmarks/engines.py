"""Benchmark of both protocol engines under the same device: register accesses, then two disks in one guest.

"Ours" is `serve` as it is, beside it `serve --engine libvfio-user`: whatever differs is the engine.
"""

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import trio

from benchmarks import fio
from benchmarks.fio import FioLoad
from benchmarks.guest_disks import OURS, GuestDevice, in_slots, make_image
from benchmarks.guest_io import find_disks, measure_disks
from benchmarks.measure import Benchmark, Options, Row
from benchmarks.register_client import compile_client, connect
from benchmarks.registers import OUR_REGISTER, End, access_rows
from benchmarks.server import server
from vfiouser_virtio import vm
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user import load
from vfiouser_virtio.serving.qemu_command import qemu_device
from vfiouser_virtio.vm.debian import cache_dir

THEIRS = "libvfio-user-engine"
Engines = dict[str, tuple[str, ...]]
"""Options of `serve`, by contender."""

LOADS = (FioLoad("read", 128, 1), FioLoad("randread", 4, 1), FioLoad("randread", 4, 32), FioLoad("randwrite", 4, 1))


def run(options: Options) -> list[Row]:
    """Nothing but a note where there is no libvfio-user."""
    try:
        engines: Engines = {OURS: (), THEIRS: ("--engine", "libvfio-user", *_library(options))}
    except ConfigError as error:
        options.note(str(error))
        return []
    return [*_registers(options, engines), *trio.run(_disks, options, engines)]


def _library(options: Options) -> tuple[str, ...]:
    """Where the server finds it: in the build that the user names, else where `load` looks. Raises ConfigError."""
    if options.libvfio_user is None:
        load()
        return ()
    found = next(options.libvfio_user.rglob("libvfio-user.so"), None)
    if found is None:
        raise ConfigError(f"--libvfio-user {options.libvfio_user}: no libvfio-user.so in it")
    return ("--libvfio-user", str(found))


def _registers(options: Options, engines: Engines) -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        program = compile_client(options, folder)
        ends = {}
        for name, switches in engines.items():
            running = stack.enter_context(server(["blk,size=1M"], *switches))
            ends[name] = End(connect(program, running.paths[0], OUR_REGISTER, stack), running.process.pid)
        return access_rows(options, ends)


async def _disks(options: Options, engines: Engines) -> list[Row]:
    with ExitStack() as stack:
        # Not /tmp, which may be in memory: there RWF_NOWAIT is not known, for one.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache_dir())))
        image = make_image(folder / "disk")
        disks = []
        for name, switches in engines.items():
            # A disk of ours locks its file.
            copy = shutil.copyfile(image, folder / name)
            running = stack.enter_context(server([f"blk,path={copy},serial={name}"], *switches))
            device = dict(qemu_device(name, running.paths[0]))
            disks.append(GuestDevice(name, device, usage=running.usage))
        options.progress("boot")
        async with vm.boot_guest(
            vm.find_qemu(),
            fio.image_with_fio(vm.guest_image(), folder),
            devices=in_slots(disks),
            memory_size="1G",
        ) as guest:
            paths = await find_disks(guest, disks, list(engines))
            return await measure_disks(guest, options, disks, paths, LOADS)


BENCHMARK = Benchmark(name="engines", summary="our engine beside libvfio-user under the same device", run=run)
