"""Benchmark of a console inside a Linux guest: bytes per second out of it, beside QEMU's own."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.guest_disks import BUILT_IN, OURS, GuestDevice
from benchmarks.measure import Options, Row, turn
from benchmarks.server import server
from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device

CONSOLE_OUTPUT = "console output"
# Linux hands on 4 KiB at a time and waits for each, so this takes a good part of a second.
_AMOUNT = 4 << 20
_TOOK = re.compile(r"real\s+(\d+)m ([0-9.]+)s")


def guest_consoles(folder: Path, stack: ExitStack) -> list[GuestDevice]:
    """One each, with a file on the host that keeps what comes out."""
    files = _files(folder)
    running = stack.enter_context(server([f"console,chardev=file:{files[OURS]}"]))
    chardev = ("-chardev", f"file,id=console-out,path={files[BUILT_IN]}")
    return [
        GuestDevice(OURS, dict(qemu_device("console", running.paths[0]), addr="0x17"), usage=running.usage),
        GuestDevice(BUILT_IN, "virtio-serial-pci,max_ports=1,addr=0x18"),
        GuestDevice("its port", "virtconsole,chardev=console-out", chardev),
    ]


async def console_output(guest: vm.Guest, folder: Path, options: Options) -> Row:
    """Write to both in turn; what arrives is counted on the host."""
    amount = _AMOUNT >> 3 if options.quick else _AMOUNT
    figures: dict[str, list[float]] = {OURS: [], BUILT_IN: []}
    for number in range(options.rounds):
        for name in turn(list(figures), number):
            figures[name].append(await _write(guest, folder, name, amount))
    return Row(metric=CONSOLE_OUTPUT, unit="MB/s", ours=figures[OURS], theirs={BUILT_IN: figures[BUILT_IN]})


async def _write(guest: vm.Guest, folder: Path, name: str, amount: int) -> float:
    # Linux numbers them by their place on the bus.
    device = f"/dev/hvc{[OURS, BUILT_IN].index(name)}"
    before = _files(folder)[name].stat().st_size
    command = f"stty -F {device} raw -echo; time dd if=/dev/zero of={device} bs=64k count={amount >> 16}"
    said = (await guest.run(command, check=True)).output
    arrived = _files(folder)[name].stat().st_size - before
    took = _TOOK.search(said)
    if took is None or arrived != amount:
        raise vm.VmError(f"{arrived} of {amount} bytes came out of the console {name}:\n{said}")
    return amount / 1e6 / max(60 * int(took[1]) + float(took[2]), 0.01)


def _files(folder: Path) -> Mapping[str, Path]:
    return {name: folder / f"console-{name}" for name in (OURS, BUILT_IN)}
