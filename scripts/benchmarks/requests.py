"""Benchmark of block requests without a VM: a driver in C that behaves as SPDK's does, and the floor of a C loop.

The driver polls the used ring and never notifies; each request is random, and made available when another one is back.
It is one program for all contenders, so that what differs is the device: `serve` with ``poll=on``, in a process of its
own; and a thread in C that does what must be done and no more. A loop in Python with nothing around it is shown for
orientation: the price of the language before there is a driver, a socket or another device.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.compiler import compile_c
from benchmarks.guest_disks import SIZE, make_image
from benchmarks.measure import Benchmark, Options, Row, Target, at_least, turn
from benchmarks.request_loop import ENTRIES, requests_per_second
from benchmarks.server import server
from benchmarks.usage import Usage
from vfiouser_virtio.vm.debian import cache_dir

_OURS, _C_LOOP, _PYTHON_LOOP = "ours", "C loop", "Python loop"
RAM_DISK, CACHED, DIRECT = "RAM disk", "file in the page cache", "file with O_DIRECT"
DISKS = (RAM_DISK, CACHED, DIRECT)
DEPTHS = (1, 8, 32, 128)
SIZES = {"512 B": 512, "4 KiB": 4 << 10, "128 KiB": 128 << 10}
TARGETS: dict[tuple[str, str, int], Target] = {
    (RAM_DISK, "4 KiB", 1): at_least(100),
    (RAM_DISK, "4 KiB", 32): at_least(250),
    (CACHED, "4 KiB", 32): at_least(150),
}
"""In thousands of requests per second."""

_RAM_DISK_SIZE = 64 << 20
_QUEUE_SIZE = 512  # room for 128 requests of three descriptors, as SPDK makes them
_MILLISECONDS = 300
_CPU_OF = ("4 KiB", (1, 32))  # of these loads the CPU time is shown as well


class Figure(NamedTuple):
    """Figures of one contender in one round."""

    thousands: float
    """Requests per second / 1000."""
    cpu_us: float
    """The device's CPU time for a request."""


class PollingDriver:
    """Process of requests.c with a device: behind a socket, or its own loop."""

    def __init__(self, command: Sequence[str], cpus: Collection[int], stack: ExitStack) -> None:
        # By default it has all of them: the loop's two threads take one each.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.enter_context(process)
        stack.callback(process.kill)
        os.sched_setaffinity(process.pid, cpus)
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self._answer()  # it is ready

    def run(self, depth: int, size: int, milliseconds: int) -> tuple[int, float]:
        """How many requests were served, and in how many seconds."""
        print(depth, size, milliseconds, file=self._input, flush=True)
        count, nanoseconds = self._answer().split()
        return int(count), int(nanoseconds) / 1e9

    def _answer(self) -> str:
        line = self._output.readline()
        if not line:
            raise RuntimeError("the driver in C has ended: see above")
        return line


class BenchDisk(NamedTuple):
    """Kind of disk: what the server and the loop are told, and what is done before each measurement."""

    name: str
    device: str
    size: int
    loop: tuple[str, ...]
    prepare: Callable[[], None]


def run(options: Options) -> list[Row]:
    """Reads of each size and depth from each kind of disk; a note alone where there is no C compiler."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        program = compile_c("requests", folder)
        if program is None:
            options.note("no C compiler: the driver is in C")
            return []
        # Not /tmp, which may be in memory.
        image_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache_dir())))
        rows = [row for disk in _disks(options, image_folder) for row in _measure(options, program, disk)]
    options.note("thousands of requests per second; the driver and the device have a CPU each, where there are two")
    return rows


def _disks(options: Options, folder: Path) -> list[BenchDisk]:
    ram = BenchDisk(RAM_DISK, f"blk,size={_RAM_DISK_SIZE}", _RAM_DISK_SIZE, (), lambda: None)
    image = folder / "disk"

    def read() -> None:
        image.read_bytes()

    files = [
        BenchDisk(CACHED, f"blk,path={image}", SIZE, (str(image),), read),
        BenchDisk(DIRECT, f"blk,path={image},cache=none", SIZE, (str(image), "direct"), lambda: None),
    ]
    disks = [disk for disk in (ram, *files) if _loads(options, disk)]
    if disks not in ([], [ram]):
        make_image(image)
    return disks


def _loads(options: Options, disk: BenchDisk) -> list[tuple[str, int]]:
    """(size, depth) of those that are wanted."""
    depths = (1, 32) if options.quick else DEPTHS
    loads = [(size, depth) for size in SIZES for depth in depths]
    return [load for load in loads if re.search(options.only, _metric(disk.name, *load))]


def _metric(disk: str, size: str, depth: int) -> str:
    return f"{disk}, {size} QD{depth}"


def _measure(options: Options, program: Path, disk: BenchDisk) -> list[Row]:
    cpus = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        running = stack.enter_context(server([f"{disk.device},poll=on,queue-size={_QUEUE_SIZE}"]))
        os.sched_setaffinity(running.process.pid, {cpus[-1]})
        command = [str(program), "client", running.paths[0], str(disk.size)]
        ours = PollingDriver(command, {cpus[0]}, stack)
        loop = PollingDriver([str(program), "loop", str(disk.size), *disk.loop], {cpus[0], cpus[-1]}, stack)
        return [
            row
            for size, depth in _loads(options, disk)
            for row in _load_rows(options, disk, size, depth, ours, running.usage, loop)
        ]


def _load_rows(
    options: Options, disk: BenchDisk, size: str, depth: int, ours: PollingDriver, usage: Usage, loop: PollingDriver
) -> list[Row]:
    metric = _metric(disk.name, size, depth)
    options.progress(metric)
    milliseconds = 20 if options.quick else _MILLISECONDS
    load = (depth, SIZES[size], milliseconds)

    def measure_ours() -> Figure:
        before = usage.cpu_s
        count, seconds = ours.run(*load)
        return Figure(count / seconds / 1e3, (usage.cpu_s - before) / count * 1e6)

    def measure_loop() -> Figure:
        count, seconds = loop.run(*load)
        return Figure(count / seconds / 1e3, seconds / count * 1e6)  # it never sleeps

    contenders: dict[str, Callable[[], Figure]] = {_OURS: measure_ours, _C_LOOP: measure_loop}
    if disk.name == RAM_DISK and depth * 3 <= ENTRIES:
        contenders[_PYTHON_LOOP] = lambda: _python_loop(depth, SIZES[size], milliseconds)
    figures: dict[str, list[Figure]] = {name: [] for name in contenders}
    for number in range(-1, options.rounds):  # the first one warms up
        for name in turn(list(contenders), number):
            disk.prepare()
            figure = contenders[name]()
            if number >= 0:
                figures[name].append(figure)
    found = figures.pop(_OURS)
    target = TARGETS.get((disk.name, size, depth))
    rows = [
        Row(
            metric=metric,
            unit="k/s",
            ours=[figure.thousands for figure in found],
            theirs={name: [figure.thousands for figure in theirs] for name, theirs in figures.items()},
            targets={"": target} if target else {},
        )
    ]
    if size == _CPU_OF[0] and depth in _CPU_OF[1]:
        rows.append(
            Row(
                metric=f"{metric}: CPU per request",
                unit="us",
                ours=[figure.cpu_us for figure in found],
                theirs={name: [figure.cpu_us for figure in theirs] for name, theirs in figures.items()},
            )
        )
    return rows


def _python_loop(depth: int, size: int, milliseconds: int) -> Figure:
    rate = requests_per_second(depth, size, milliseconds / 1e3)
    return Figure(rate / 1e3, 1e6 / rate)


BENCHMARK = Benchmark(name="requests", summary="block requests of a driver in C that polls, as SPDK's does", run=run)
