"""QEMU machine that never runs (``-S``), for tests: shared RAM, and PCI functions reached by qtest.

::

    async with qtest_machine(vm.find_qemu(), {"blk0": "/run/x/blk0.sock"}) as machine:
        port = machine.ports["blk0"]            # a guest.ports.PciPort
        await port.config_read(0, 4)

It is there in about 0.15 s, and every request goes through QEMU's own vfio-user client. There is one QEMU for each
test: a function cannot be taken out again, because QEMU 11.1 aborts on ``device_del`` where there is MSI-X.
"""

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.testing.doorbell import BAR, InterruptDoorbell
from vfiouser_virtio.testing.qtest import Qtest, QtestClosed
from vfiouser_virtio.testing.qtest_port import ECAM_BASE, BarAddresses, InterruptLines, QtestPort
from vfiouser_virtio.vfio_user import Server, SharedMemory, listen_path
from vfiouser_virtio.vm import Qemu, VmError

_RAM_SIZE = 32 << 20
# Below are the holes that a PC has in its RAM: frame buffer, ROMs.
_RAM_START = 1 << 20
# PCIEXBAR of the q35 host bridge: the base of ECAM, and bit 0, which enables it, for 256 buses.
_CONFIG_ADDRESS, _CONFIG_DATA, _PCIEXBAR = 0xCF8, 0xCFC, 0x80000060
# One slot for each of the four interrupt lines; the doorbell, which has none, is well behind them.
_SLOTS = (1, 2, 3, 4)
_DOORBELL_SLOT = 24
# QEMU gives up on a server that does not answer for so long. A test that is stopped in a debugger takes its time.
_MESSAGE_TIMEOUT_MS = 60_000


@dataclass(frozen=True)
class QtestMachine:
    """Parts of the machine that a test reaches."""

    ports: Mapping[str, QtestPort]
    memory: SharedMemory
    qtest: Qtest
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]

    @property
    def qemu_stderr(self) -> str:
        """All that QEMU has printed."""
        return os.pread(self.stderr.fileno(), os.fstat(self.stderr.fileno()).st_size, 0).decode(errors="replace")

    async def run(self) -> None:
        """Talk to QEMU. Raises VmError, with what QEMU has printed, when that ends, which it should not."""
        await self.qtest.run()
        raise VmError(f"QEMU ended with status {self.process.wait(10)}: {self.qemu_stderr.strip()}")


@asynccontextmanager
async def qtest_machine(qemu: Qemu, sockets: Mapping[str, str | os.PathLike[str]]) -> AsyncIterator[QtestMachine]:
    """A machine with up to four functions, by name, whose servers listen at ``sockets``; it ends with the block.

    Raises VmError when QEMU does not start, or ends before the block does.
    """
    if len(sockets) > len(_SLOTS):
        raise ValueError(f"{len(sockets)} functions: the machine has interrupt lines for {len(_SLOTS)}")
    doorbell, lines = InterruptDoorbell(), InterruptLines()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = stack.enter_context(SharedMemory(_RAM_SIZE, address=0))
        memory.alloc(_RAM_START)
        listener = stack.enter_context(listen_path(folder / "doorbell"))
        ours, theirs = socket.socketpair()
        qtest = Qtest(ours, lines.change)
        stack.callback(qtest.close)
        devices = dict(zip(_SLOTS, sockets.values(), strict=False)) | {_DOORBELL_SLOT: folder / "doorbell"}
        stderr = stack.enter_context(tempfile.TemporaryFile())
        async with background() as nursery:
            nursery.start_soon(Server(doorbell.function).serve, listener)
            with theirs:
                process = _start(qemu, memory, theirs, devices, stderr)
            try:
                ports = {
                    name: QtestPort(qtest, slot, name, memory, doorbell, lines)
                    for slot, name in zip(_SLOTS, sockets, strict=False)
                }
                machine = QtestMachine(ports, memory, qtest, process, stderr)
                nursery.start_soon(machine.run)
                await _power_on(machine, doorbell, lines)
                yield machine
            except QtestClosed:
                await trio.sleep_forever()  # until machine.run() says why: with QEMU's own words
            finally:
                process.kill()
                process.wait()


def _start(
    qemu: Qemu,
    memory: SharedMemory,
    qtest: socket.socket,
    devices: Mapping[int, str | os.PathLike[str]],
    stderr: IO[bytes],
) -> subprocess.Popen[bytes]:
    """Start QEMU with this RAM and these devices, by slot. RAM and qtest are file descriptors that it inherits."""
    assert memory.fd is not None
    arguments = ["-no-user-config", "-nodefaults", "-display", "none", "-accel", "tcg", "-S"]
    # Only what takes time to make is left out of the machine.
    arguments += ["-machine", "q35,memory-backend=ram,usb=off,sata=off,smbus=off,i8042=off,graphics=off"]
    backend = {"qom-type": "memory-backend-file", "id": "ram", "size": memory.size, "share": True}
    backend["mem-path"] = f"/proc/self/fd/{memory.fd}"
    arguments += ["-object", json.dumps(backend), "-m", f"{memory.size >> 20}M"]
    arguments += ["-chardev", f"socket,id=qtest,fd={qtest.fileno()}"]
    arguments += ["-qtest", "chardev:qtest", "-qtest-log", "/dev/null"]
    for slot, path in devices.items():
        device = {"driver": "vfio-user-pci", "addr": f"{slot:x}", "x-msg-timeout": _MESSAGE_TIMEOUT_MS}
        arguments += ["-device", json.dumps(device | {"socket": {"type": "unix", "path": os.fspath(path)}})]
    return subprocess.Popen(
        qemu.command(arguments),
        env=qemu.environment,
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        pass_fds=[memory.fd, qtest.fileno()],
    )


async def _power_on(machine: QtestMachine, doorbell: InterruptDoorbell, lines: InterruptLines) -> None:
    """What firmware does."""
    qtest = machine.qtest
    await qtest.execute(f"outl {_CONFIG_ADDRESS:#x} {_PCIEXBAR:#x}")
    await qtest.execute(f"outl {_CONFIG_DATA:#x} {ECAM_BASE | 1:#x}")
    await qtest.execute("irq_intercept_in ioapic")
    addresses = BarAddresses()
    bell = QtestPort(qtest, _DOORBELL_SLOT, "doorbell", machine.memory, doorbell, lines)
    for port in (bell, *machine.ports.values()):
        await port.power_on(addresses)
    doorbell.address = bell.bars[BAR]
