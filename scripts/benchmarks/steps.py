"""Benchmark of single steps between a driver and a device, in CPU time of this process: no socket.

They are what `scripts/bench --against` is for: small enough that a few percent can be seen.
"""

import os
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time_ns

import trio

from benchmarks.measure import Benchmark, Options, Row
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.pci.msix import Msix

# A figure is the best of some slices, each of a few ms: other programs make code slower, never faster.
_SLICES = 80
# What QEMU maps of a q35 machine with 3 GiB, in bytes: below and above the VGA hole, BIOS, RAM above 4 GiB.
_QEMU_LAYOUT = ((0, 0xA_0000), (0xC_0000, 0x2_0000), (0xE_0000, 0x2_0000), (0x10_0000, 0x7FF0_0000), (1 << 32, 1 << 30))


async def _interrupt(slices: int) -> float:
    msix = Msix(1)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    msix.assign(0, [fd])
    return _best(partial(msix.fire, 0), slices, 1000)


def _best(step: Callable[[], object], slices: int, count: int) -> float:
    times = []
    for _ in range(slices):
        begin = process_time_ns()
        for _ in range(count):
            step()
        times.append((process_time_ns() - begin) / 1e3 / count)
    return min(times)


async def _map_and_unmap(slices: int) -> float:
    """All of a machine's RAM, mapped and unmapped."""
    memory = GuestMemory()
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 3 << 30)

    def once() -> None:
        for address, size in _QEMU_LAYOUT:
            offset = address if address < 1 << 32 else 2 << 30
            memory.map(address, size, readable=True, writable=True, fd=os.dup(fd), offset=offset)
        for address, size in _QEMU_LAYOUT:
            memory.unmap(address, size)

    try:
        return _best(once, slices, 10) / len(_QEMU_LAYOUT)
    finally:
        memory.clear()
        os.close(fd)


def run(options: Options) -> list[Row]:
    """Each step, ``rounds`` times."""
    steps: dict[str, Callable[[int], Awaitable[float]]] = {
        "interrupt by eventfd": _interrupt,
        "DMA map and unmap": _map_and_unmap,
    }
    try:
        from benchmarks.step_requests import REQUESTS
    except ImportError as error:  # an older revision, by `--against`
        options.note(f"without requests: {error}")
    else:
        steps |= REQUESTS
    slices = 1 if options.quick else _SLICES
    return [
        Row(metric=name, unit="us", ours=[trio.run(step, slices) for _ in range(options.rounds)])
        for name, step in steps.items()
    ]


BENCHMARK = Benchmark(name="steps", summary="single steps between a driver and a device, in CPU time", run=run)
