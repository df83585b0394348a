"""Linux guests in QEMU on one server, under mixed load, killed at any moment; now and then the server goes with them.

Each step of a guest writes a block whose content its number says, flushes it, reads another one back, and uses the
console, the source of entropy and the network. What a step has reported done must be in the image for ever.
"""

import hashlib
import random
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfiouser_virtio import vm
from vfiouser_virtio.background import background
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.testing.soak.children import Child, Children

SLOTS, SLOT = 64, 64 << 10
TIMEOUT = 600.0
"""Seconds for a boot, or for a step, on a machine that does much else."""
_STEPS = 40
_APPEND = "rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup"
_DEVICES = {
    "blk": "blk,path={folder}/linux.img,serial=soak",
    "console": "console,chardev=file:{folder}/console.txt",
    "rng": "rng",
    "net": "net,netdev=boot",
}
_SET_UP = """
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
"""
_STEP = """
yes {word} | head -c {size} | dd of=/dev/vda bs=64k seek={slot} conv=fsync,notrunc 2>/dev/null
dd if=/dev/vda bs=64k count=1 skip={other} iflag=direct 2>/dev/null | md5sum
head -c 4096 /dev/hwrng | wc -c
echo {word} >/dev/hvc0
ping -c 1 -W 60 10.0.2.2 | grep -c '1 packets received'
"""


def slot_content(number: int) -> bytes:
    """Bytes that write ``number`` puts into its slot."""
    line = f"write-{number}\n".encode()
    return (line * (SLOT // len(line) + 1))[:SLOT] if number else bytes(SLOT)


@dataclass
class LinuxResult:
    """Record of the guests."""

    guests: int = 0
    steps: int = 0
    ended: dict[str, int] = field(default_factory=lambda: {"powered off": 0, "killed": 0, "killed with the server": 0})
    complaints: list[str] = field(default_factory=list)


class LinuxGuests:
    """Server with a disk, a console, entropy and a network in ``folder``, and one guest after the other."""

    def __init__(self, processes: Children, folder: Path, seed: int) -> None:
        self.result = LinuxResult()
        self._processes, self._folder = processes, folder
        self._chance = random.Random(f"{seed}:linux")
        self._image = folder / "linux.img"
        self._image.write_bytes(bytes(SLOTS * SLOT))
        self._flushed = [0] * SLOTS
        self._asked: tuple[int, int] | None = None
        """Slot and number of a write that may or may not have been done."""
        self._number = 0
        self._server: Child | None = None
        self._servers = 0

    async def guest(self) -> None:
        """The life of one guest, and a look at the disk after it."""
        qemu, image = vm.find_qemu(), vm.guest_image()
        server = self._server = self._server or await self._start_server()
        how = self._chance.choices(list(self.result.ended), [2, 5, 2])[0]
        devices = [
            {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(self._folder / f"{kind}.sock")}}
            for kind in _DEVICES
        ]
        try:
            async with vm.boot_guest(
                qemu, image, devices=devices, memory_size="192M", append=_APPEND, ready_timeout=TIMEOUT
            ) as guest:
                self.result.guests += 1
                await guest.run(_SET_UP, timeout=TIMEOUT, check=True)
                for _ in range(self._chance.randrange(_STEPS)):
                    await self._step(guest)
                await self._end(how, guest, server)
                self.result.ended[how] += 1
        except BaseException as error:
            found = [each for each in leaves(error) if not isinstance(each, trio.Cancelled)]
            if not found or not all(isinstance(each, vm.VmError) for each in found):
                raise
            self._complain(f"{found[0]}")
        await self._after(how, server)

    async def _end(self, how: str, guest: vm.Guest, server: Child) -> None:
        if how == "powered off":
            await guest.poweroff(timeout=TIMEOUT)
            return
        async with background() as tasks:
            tasks.start_soon(self._doomed_step, guest)
            await trio.sleep(self._chance.random() * 0.3)
            if how == "killed with the server":
                await server.kill_family()
            guest.kill()
            await guest.wait_exit(timeout=TIMEOUT)

    async def _doomed_step(self, guest: vm.Guest) -> None:
        try:
            await self._step(guest)
        except vm.VmError:
            pass  # that is what it is for

    async def _step(self, guest: vm.Guest) -> None:
        chance = self._chance
        self._number += 1
        slot, other = chance.sample(range(SLOTS), 2)
        self._settle_asked()
        self._asked = slot, self._number
        word = f"write-{self._number}"
        command = _STEP.format(word=shlex.quote(word), size=SLOT, slot=slot, other=other)
        result = await guest.run(command, timeout=TIMEOUT, check=True)
        self._flushed[slot], self._asked = self._number, None
        self.result.steps += 1
        md5 = hashlib.md5(slot_content(self._flushed[other]), usedforsecurity=False).hexdigest()
        if (said := result.output.split()) != [md5, "-", "4096", "1"]:
            self._complain(f"step {self._number}: {md5} - 4096 1 expected, the guest says {said}")
        with trio.move_on_after(TIMEOUT):
            while not self._console_has(word):  # noqa: ASYNC110 - a file of another process
                await trio.sleep(0.01)
            return
        self._complain(f"step {self._number}: {word} does not come on the console")

    def _settle_asked(self) -> None:
        """Take a write that was in doubt as it is on the disk: the next guest may read it."""
        if self._asked is not None:
            slot, number = self._asked
            content = self._slot(slot)
            if content == slot_content(number):
                self._flushed[slot] = number
            elif content != slot_content(self._flushed[slot]):
                # Half done, as may be: the guest that reads it next must find something that is known.
                with self._image.open("r+b") as file:
                    file.seek(slot * SLOT)
                    file.write(slot_content(self._flushed[slot]))
            self._asked = None

    def _slot(self, slot: int) -> bytes:
        with self._image.open("rb") as file:
            file.seek(slot * SLOT)
            return file.read(SLOT)

    def _console_has(self, word: str) -> bool:
        with (self._folder / "console.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            return word.encode() in file.read()

    async def _after(self, how: str, server: Child) -> None:
        """The disk has what was flushed, and the server is there unless it was killed."""
        if how == "killed with the server":
            self._server = None
        elif server.status is not None:
            self._complain(f"the server ended by itself with status {server.status}")
            self._server = None
        for slot in range(SLOTS):
            content, old = self._slot(slot), slot_content(self._flushed[slot])
            new = slot_content(self._asked[1]) if self._asked and self._asked[0] == slot else old
            for at in range(0, SLOT, 512):
                if content[at : at + 512] not in (old[at : at + 512], new[at : at + 512]):
                    what = content[at : at + 32]
                    self._complain(f"slot {slot}, byte {at:#x}: {what!r}, flushed was write {self._flushed[slot]}")
                    break
        self._settle_asked()

    async def _start_server(self) -> Child:
        arguments = ["serve"]
        for kind, device in _DEVICES.items():
            path = self._folder / f"{kind}.sock"
            arguments += ["--device", f"{device.format(folder=self._folder)},socket={path}"]
        self._servers += 1
        log = self._folder / f"server-{self._servers}.log"
        server = await self._processes.start("vfiouser_virtio.cli:main", arguments, log=log)
        with trio.fail_after(TIMEOUT):
            while not (log.exists() and "\nready " in log.read_text()) and server.status is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        return server

    async def close(self) -> None:
        """The server ends."""
        if self._server is not None:
            with trio.CancelScope(shield=True):
                await self._server.kill_family()

    def _complain(self, what: str) -> None:
        self.result.complaints.append(f"Linux: {what}")
