"""Devices of examples/pci in front of the drivers that stock Debian has for them, all in one guest."""

import hashlib
import logging
import re
from pathlib import Path

import pytest
import trio
from i2c_board import I2cBoard
from pci.accelerator import Accelerator
from pci.e1000 import E1000
from pci.idio16 import Idio16
from pci.nvme import Nvme
from pci.uart import Uart
from support import gallery, gallery_card
from support.amounts import Amounts
from support.vm_devices import sparse

from vfiouser_virtio import serve, vm
from vfiouser_virtio.backends.net.boot.netdev import BootNetdev
from vfiouser_virtio.backends.net.hub import HubNetdev, join
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.background import background
from vfiouser_virtio.devices.net import Net

pytestmark = pytest.mark.qemu

UIO = "1234 5a12"
HUB = "gallery"
READY = 600
"""Seconds for the guest to start: e1000 reads its EEPROM bit by bit, some 10,000 accesses of registers."""


class Terminal:
    """Far end of the serial line: sends back what comes, and then is a person who types."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def echo(self) -> None:
        """Send back what comes, until cancelled."""
        async for data in self._stream:
            await self._stream.send_all(data)

    async def answer(self, prompt: str, answer: str) -> None:
        """Wait for a prompt, and type."""
        seen = b""
        with trio.fail_after(120):
            while prompt.encode() not in seen:
                seen += await self._stream.receive_some()
        await self._stream.send_all(answer.encode())


class Workshop:
    """The guest, and the devices in it."""

    def __init__(self, guest: vm.Guest, idio: Idio16, terminal: Terminal, board: I2cBoard, image: Path) -> None:
        self.guest, self.idio, self.terminal, self.board, self.image = guest, idio, terminal, board, image

    async def run(self, script: str) -> list[str]:
        result = await self.guest.run(f"set -e\n{gallery.FIND}\n{gallery_card.FIND}\n{script}", timeout=240, check=True)
        return result.output.splitlines()

    async def set_up(self) -> None:
        """After each start of the guest."""
        await self.run(f"echo {UIO} >/sys/bus/pci/drivers/uio_pci_generic/new_id")
        await self.run(gallery_card.SET_UP)

    async def use_all(self, text: str) -> None:
        """What each device is for, by its driver."""
        self.idio.outputs_low.value = self.idio.outputs_high.value = 0
        self.idio.inputs = 0
        slot = (await self.run("find_device 494f:0dc8"))[0].rpartition("/")[2]
        assert await self.run(gallery.GPIO) == [
            slot, "32", "OUT3 1 IIN3 1", "OUT3 0 IIN3 0", "OUT3 1 IIN3 1", "IIN12 1 IIN13 0"
        ]  # fmt: skip
        assert self.idio.outputs == 1 << 3 | 1 << 12
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.terminal.echo)
            assert await self.run(gallery.ECHO) == ["hello over the wire", "all of it"]
            nursery.cancel_scope.cancel()
        self.board.thermometer.celsius = -12.5
        self.board.barometer.celsius, self.board.barometer.pascal = 23.0, 98765.0
        said = await self.run(gallery.I2C % {"text": text, "length": len(f"over pages: {text}")})
        assert said[:2] == ["lm75 -12500 60500 75000", f"eeprom vfiouser-virtio, over pages: {text}"]
        assert bytes(self.board.eeprom.memory[20:]).startswith(f"over pages: {text}".encode())
        assert self.board.thermometer.limits[3] == 60.5
        assert said[3:] == ["ismt-msi"]
        name, celsius, pascal = said[2].split()
        assert name == "bmp280"
        assert float(celsius) == pytest.approx(23_000, abs=20)
        assert float(pascal) == pytest.approx(98.765, abs=0.01)
        assert await self.run(gallery.ACCELERATOR % {"ram": gallery.RAM}) == [
            "interrupts 4 status 0x00000001 head 0x00000002",
            "results 0x00000001 0x00000002",
            "digest",
            "status 0x00000000",
        ]
        assert await self.run(gallery_card.USE) == gallery_card.USED

    async def use_disk(self, resets: int) -> None:
        """Reads and writes all the time, over so many resets of the controller; the host has what the guest has."""
        name, *sums, whole, left = await self.run(gallery.NVME % {"resets": resets})
        assert name == f"vfiouser-virtio NVMe gallery {(16 << 20) // 512}"
        data = self.image.read_bytes()[: 1 << 20]
        assert sums == [hashlib.sha256(data[at : at + (1 << 18)]).hexdigest() for at in range(0, 1 << 20, 1 << 18)]
        assert whole == hashlib.sha256(data).hexdigest()
        assert left == "0", "what was discarded reads as zeros from this file"

    async def log_in(self) -> None:
        """A login over the serial port, and a command."""
        await self.run(gallery.LOGIN)
        await self.terminal.answer("login: ", "root\n")
        # The shell asks a terminal where its cursor is, once it is ready for what is typed.
        await self.terminal.answer("# \x1b[6n", "echo $((6 * 7)) is the answer\n")
        # Once it is here: as the shell exits, Linux hangs the line up, and what was not sent yet is lost.
        await self.terminal.answer("42 is the answer\r\n", "exit\n")

    async def errors(self) -> list[str]:
        """What the guest's kernel calls an error, other than that a second was over (ETIMEDOUT).

        A guest's clock may run fast on a busy machine: then i2c-ismt gives up, and bmp280 says what it could not read
        or write without that number. It is bound anew until it could, and its values are looked at.
        """
        bad = [line for line in await self.run("dmesg -r") if line[:3] in ("<0>", "<1>", "<2>", "<3>")]
        return [line for line in bad if "-110" not in line and not re.search(r"bmp280 .*failed to (read|write)", line)]


async def test_stock_drivers_work_with_the_gallery(
    amounts: Amounts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qemu, image = vm.find_qemu(), vm.guest_image("trixie:amd64", more_modules=(*gallery.MODULES, *gallery_card.MODULES))
    chardev, stream = pair()
    idio, board = Idio16(loopback=True), I2cBoard()
    disk = sparse(tmp_path / "disk", 16 << 20)
    card = E1000(netdev=HubNetdev(hub=HUB), mac=gallery_card.CARD_MAC)
    peer = Net(netdev=HubNetdev(hub=HUB), mac=gallery_card.PEER_MAC)
    # The first four have one of QEMU's wires each, which idio's driver does not share; those behind them send messages.
    devices = (idio, Uart(chardev=chardev), Accelerator(), card, board, peer, Nvme(path=disk, serial="gallery"))
    async with (
        stream,
        serve(*devices) as served,
        vm.boot_guest(qemu, image, devices=served.qemu_devices, append=gallery.APPEND, ready_timeout=READY) as guest,
        background() as tasks,
    ):
        workshop = Workshop(guest, idio, Terminal(stream), board, disk)
        tasks.start_soon(join, HubNetdev(hub=HUB), BootNetdev())
        await workshop.set_up()
        await workshop.use_all("first")
        assert await workshop.run(gallery_card.OFFLOADS) == gallery_card.OFFLOADED
        await workshop.use_disk(amounts.gallery_rebinds)
        await workshop.log_in()
        assert await workshop.errors() == []
        await guest.reboot(timeout=READY)
        await workshop.set_up()
        for drivers, times in ((gallery.DRIVERS, amounts.gallery_rebinds), (gallery_card.DRIVER, amounts.card_rebinds)):
            for device_id, driver in drivers.items():
                await workshop.run(gallery.REBIND % {"id": device_id, "driver": driver, "times": times})
        await workshop.use_all("bound again after a reboot")
        await workshop.use_disk(1)
        assert await workshop.errors() == []
    # No register that is not modelled, no driver that polls for ever, no bug of a device.
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []
