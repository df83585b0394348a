"""Devices of ours in a real machine: a process of ours with sockets, a QEMU at them, and Linux in that."""

import logging
import os
import re
import shlex
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from support.engines import current_engine

from vfiouser_virtio import serve, vm
from vfiouser_virtio.backends.block import Cancel, Done, Segments
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Device, Offer

MIB = 1 << 20
APPEND = "rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup"
"""For the kernel's command line: on a busy machine TCG's clock can jump, which looks like a stall of Linux's."""
# Warnings that could be about a device of ours.
_OURS = re.compile(r"virtio|vport|\bvd[a-z]|hvc|hwrng|hw_random|I/O error|msi|irq|rcu:|blocked for", re.IGNORECASE)
_HARMLESS = re.compile(r"ACPI: IRQ \d+ override")
# A whole warning of Linux's own, which it has about ACPI's interrupt links at times, as it wakes on a busy machine.
_WAKING = re.compile(
    r"[^\n]*\[ cut here \](?:(?!\[ end trace ).)*?\birqrouter_resume\+.*?\[ end trace [^\n]*", re.DOTALL
)


@dataclass
class Machine:
    """A guest that runs, and the devices that it has, by name."""

    guest: vm.Guest
    devices: Mapping[str, Device]
    functions: Mapping[str, VirtioPci] = field(default_factory=dict)

    async def run(self, command: str, *, timeout: float = 240) -> str:
        """What a command in the guest prints, without white space at the end; it must succeed."""
        return (await self.guest.run(f"set -e\n{command}", timeout=timeout, check=True)).output.rstrip()

    async def complaints(self) -> list[str]:
        """What the guest's kernel complains about: every error, and warnings about what could be ours."""
        lines = _WAKING.sub("", await self.run("dmesg -r")).splitlines()
        bad = [line for line in lines if re.match(r"<[0-3]>", line)]
        bad += [line for line in lines if line.startswith("<4>") and _OURS.search(line) and not _HARMLESS.search(line)]
        return bad

    async def check_quiet(self, caplog: pytest.LogCaptureFixture) -> None:
        """Nobody complains: not the guest's kernel, not QEMU, not this process."""
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        # The advice to use share=on, which is what tests with private memory do not.
        logged = [message for message in warned if "has no file descriptor" not in message]
        for who, said in (
            ("the guest's kernel", "\n".join(await self.complaints())),
            ("QEMU", self.guest.qemu_stderr),
            ("this process", "\n".join(logged)),
        ):
            assert not said, f"{who} complains:\n{said}"


@asynccontextmanager
async def booted(
    qemu: vm.Qemu,
    image: vm.GuestImage,
    devices: Mapping[str, Device],
    *,
    ids: Style = "default",
    offer: Offer | None = None,
    append: str = "",
    **options: Any,
) -> AsyncIterator[Machine]:
    """Serve devices, by name, and boot a guest that has them in this order. ``options`` are `vm.boot_guest`'s."""
    made = {name: VirtioPci(device, ids=ids, name=name, offer=offer) for name, device in devices.items()}
    async with (
        serve(*made.values(), engine=current_engine()) as served,
        vm.boot_guest(qemu, image, devices=served.qemu_devices, append=f"{APPEND} {append}", **options) as guest,
    ):
        yield Machine(guest, devices, made)


@asynccontextmanager
async def booted_from_options(
    qemu: vm.Qemu, image: vm.GuestImage, devices: Sequence[str], *, append: str = "", **options: Any
) -> AsyncIterator[Machine]:
    """As `booted`, with devices as the command line takes them: ``blk,path=disk.img,packed=on``."""
    async with (
        serve(*devices, engine=current_engine()) as served,
        vm.boot_guest(qemu, image, devices=served.qemu_devices, append=f"{APPEND} {append}", **options) as guest,
    ):
        functions = {
            endpoint.name: function
            for endpoint, function in zip(served.endpoints, served.functions, strict=True)
            if isinstance(function, VirtioPci)
        }
        yield Machine(guest, {name: function.device for name, function in functions.items()}, functions)


# ---- disks ---------------------------------------------------------------------------------------------------------


class ObservedDisk(FileBackend):
    """A disk in a file that counts what is asked of it, and that a test can break, or stop for a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.broken = range(0)
        """Bytes that can neither be read nor written."""
        self.gather = 0
        """Reads and writes wait until so many are under way, up to 30 s; it is 0 again when they were."""
        self.flushes = self.zeroed = self.under_way = 0
        self._gathered = trio.lowlevel.ParkingLot()

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return not self.gather and not self.broken and super().read_nowait(offset, segments)

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        return not self.gather and not self.broken and super().write_nowait(offset, segments)

    def start_read(self, offset: int, segments: Segments, done: Done) -> Cancel | None:
        """All goes through `read`, `write` and `flush`."""

    def start_write(self, offset: int, segments: Segments, done: Done) -> None:
        """See `start_read`."""

    def start_flush(self, done: Done) -> None:
        """See `start_read`."""

    async def read(self, offset: int, segments: Segments) -> None:
        await self._observe(offset, sum(map(len, segments)))
        await super().read(offset, segments)

    async def write(self, offset: int, segments: Segments) -> None:
        await self._observe(offset, sum(map(len, segments)))
        await super().write(offset, segments)

    async def flush(self) -> None:
        self.flushes += 1
        await super().flush()

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.zeroed += length
        await super().write_zeroes(offset, length, unmap)

    async def _observe(self, offset: int, length: int) -> None:
        self.under_way += 1
        try:
            if self.gather and self.under_way >= self.gather:
                self.gather = 0
                self._gathered.unpark_all()
            elif self.gather:
                with trio.move_on_after(30):
                    await self._gathered.park()
            if offset < self.broken.stop and offset + length > self.broken.start:
                raise OSError(5, "the test has broken this part of the disk")
        finally:
            self.under_way -= 1


def sparse(path: Path, size: int) -> Path:
    """A new file of holes."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


def fill(path: Path, size: int) -> None:
    """A new file of bytes that are nowhere the same."""
    with path.open("xb") as file:
        for start in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - start)))


async def difference(one: Path, other: Path, size: int) -> str:
    """Where the first ``size`` bytes of two files differ, as cmp(1) says it; empty where they do not."""
    compared = await trio.run_process(["cmp", "-n", str(size), one, other], capture_stdout=True, check=False)
    return compared.stdout.decode()


def slice_of(path: Path, offset: int, length: int) -> bytes:
    """Some bytes of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


# ---- consoles ------------------------------------------------------------------------------------------------------

OPEN_PORT = r"""
find_port() {
    for port in /sys/class/virtio-ports/*; do
        if [ "$(cat $port/name 2>/dev/null)" = "$1" ]; then echo /dev/${port##*/}; fi
    done
}
case %(port)s in
    hvc*) device=/dev/%(port)s ;;
    *) device=$(find_port %(port)s) ;;
esac
exec 3<>$device
[ ! -t 3 ] || stty raw -echo <&3
"""


async def talk(machine: Machine, stream: trio.SocketStream, port: str) -> None:
    """Lines through a port of a console, both ways; ``port`` is hvc0, or the name of one that is no console."""
    answered = []

    async def host() -> None:
        line = await receive_line(stream)
        assert line == f"guest to host on {port}", line
        await stream.send_all(b"host to guest\nand \xc3\xa4 second line\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(host)
        command = "\n".join(
            [
                OPEN_PORT % {"port": shlex.quote(port)},
                f"echo guest to host on {port} >&3",
                'read -r line <&3; echo "$line"',
                'read -r line <&3; echo "$line"',
            ]
        )
        answered = (await machine.run(command)).splitlines()
    assert answered == ["host to guest", "and ä second line"], answered


async def receive_line(stream: trio.SocketStream) -> str:
    """The next line from the guest, without its end; what follows must wait for an answer."""
    received = b""
    with trio.fail_after(60):
        while not received.endswith(b"\n"):
            more = await stream.receive_some()
            assert more, f"the port was closed after {received!r}"
            received += more
    return received.decode().rstrip("\r\n")


# ---- what the process holds ------------------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """How much this process holds of what could leak, by kind."""
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "mappings of guest memory": Path("/proc/self/maps").read_text().count("/memfd:"),
        # Trio's own are kept for ten seconds after their last use.
        "threads": sum(not thread.name.startswith("Trio") for thread in threading.enumerate()),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
    }


async def check_held(before: Mapping[str, int]) -> None:
    """No more is held than ``before``. What lasts for seconds, as the search for silent drivers, may end first."""
    with trio.move_on_after(30):
        while more_than(before):
            await trio.sleep(0.2)
    assert not more_than(before)


def more_than(before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What `held` has more of than before: by kind, then and now."""
    return {kind: (before[kind], count) for kind, count in held().items() if count > before[kind]}
