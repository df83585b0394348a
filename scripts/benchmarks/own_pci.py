"""Benchmark of a PCI device of one's own, in CPU time of this process: registers, hooks and DMA, no socket."""

import os
from collections.abc import Callable
from functools import partial
from time import process_time_ns

import trio

from benchmarks.measure import Benchmark, Options, Row, at_most
from benchmarks.step_requests import Nobody
from vfiouser_virtio.pci import Bar, Identity, PciDevice, PciFunction, Register, bar
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.transports.pci_device import PciDeviceFunction

# A figure is the best of some slices, each of a few ms: other programs make code slower, never faster.
_SLICES, _CALLS = 40, 2000
_IDENTITY = Identity(vendor=0x1234, device=0x11E8)
_PAGE = 4096
_BARE = "bare callback"


class _Chip(PciDevice):
    """Device with a plain register, and one with a hook."""

    identity = _IDENTITY
    regs = bar(0, size=_PAGE)
    plain = Register(0x00)
    hooked = Register(0x04)

    @hooked.on_write
    def written(self, value: int) -> None:
        """Nothing: what it costs to get here is what counts."""


def _bare() -> PciFunction:
    """The same without a register: bytes, and two functions."""
    values = bytearray(_PAGE)

    def read(offset: int, count: int) -> bytes:
        return bytes(values[offset : offset + count])

    def write(offset: int, data: bytes | bytearray | memoryview) -> None:
        values[offset : offset + len(data)] = data

    function = PciFunction(_IDENTITY)
    function.add_bar(0, Bar(_PAGE, read, write))
    return function


def _best(step: Callable[[], object], slices: int) -> float:
    times = []
    for _ in range(slices):
        begin = process_time_ns()
        for _ in range(_CALLS):
            step()
        times.append((process_time_ns() - begin) / 1e3 / _CALLS)
    return min(times)


async def _dma_read(chip: _Chip, slices: int) -> float:
    times = []
    for _ in range(slices):
        begin = process_time_ns()
        for _ in range(_CALLS):
            await chip.dma.read(0x10000, _PAGE)
        times.append((process_time_ns() - begin) / 1e3 / _CALLS)
    return min(times)


def run(options: Options) -> list[Row]:
    """In turn, ``rounds`` times."""
    slices = 1 if options.quick else _SLICES
    chip, bare = _Chip(), _bare()
    function = PciDeviceFunction(chip)
    for each in (function, bare):
        each.connected(Nobody())
        each.region_write(PciRegion.CONFIG, 4, b"\x06\0")
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _PAGE)
    function.dma_map(0x10000, _PAGE, readable=True, writable=True, fd=fd, offset=0)
    value = memoryview(b"\1\2\3\4")
    figures: dict[str, list[float]] = {name: [] for name in ("read", "bare read", "write", "bare write", "hook", "dma")}
    for _ in range(options.rounds):
        for name, who, offset in (("", function, 0), ("bare ", bare, 0)):
            figures[f"{name}read"].append(_best(partial(who.region_read, PciRegion.BAR0, offset, 4), slices))
            figures[f"{name}write"].append(_best(partial(who.region_write, PciRegion.BAR0, offset, value), slices))
        hooked = _best(partial(function.region_write, PciRegion.BAR0, 4, value), slices)
        figures["hook"].append(max(hooked - figures["write"][-1], 0.001))
        figures["dma"].append(trio.run(_dma_read, chip, slices))
    function.disconnected()
    bare.disconnected()
    return [
        Row(
            metric="register read",
            unit="us",
            ours=figures["read"],
            theirs={_BARE: figures["bare read"]},
            targets={_BARE: at_most(1.3)},
        ),
        Row(metric="register write", unit="us", ours=figures["write"], theirs={_BARE: figures["bare write"]}),
        Row(metric="hook", unit="us", ours=figures["hook"], targets={"": at_most(1.0)}),
        Row(metric="DMA read of 4 KiB, mapped", unit="us", ours=figures["dma"], targets={"": at_most(3.0)}),
    ]


BENCHMARK = Benchmark(name="own-pci", summary="registers, hooks and DMA of a PCI device of one's own", run=run)
