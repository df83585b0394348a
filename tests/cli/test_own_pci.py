"""`serve` of a PCI device of one's own, as a process: burndown on SIGUSR1, and a spin that is named."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import trio
from support.command import PATIENCE, run_command, serve_process
from support.pci_chip import Chip

from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.register_names import RegisterNames
from vfiouser_virtio.vfio_user import connect

CHIP = '''
"""A chip that is never ready."""

from vfiouser_virtio.pci import Doorbell, Identity, PciDevice, Register, bar, field, flag


class Never(Register):
    enable = flag(0)
    mode = field(7, 4)


class Lazy(PciDevice):
    identity = Identity(vendor=0x1234, device=0x11E8)
    regs = bar(0, size=0x1000)
    start = Doorbell(0x00)
    ready = Register(0x04, access="ro")
    never = Never(0x08)

    async def run(self) -> None:
        async for _ in self.start:
            pass
'''


async def lines(path: Path, enough: Callable[[str], bool]) -> str:
    """The file's text, once there is ``enough`` of it."""
    with trio.fail_after(PATIENCE):
        while not enough(text := path.read_text()):
            await trio.sleep(0.02)
    return text


async def test_burndown_and_spin(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "lazy.py").write_text(CHIP)
    report = folder / "report.json"
    trace = folder / "trace.txt"
    arguments = ["--device", f"lazy.py:Lazy,burndown={report},spin=50,unmodelled=zero"]
    arguments += ["--log-level", "info", f"--trace={trace}"]
    async with serve_process(*arguments, folder=folder) as serving:
        async with connect(serving.sockets[0]) as client:
            await client.region_write(PciRegion.CONFIG, 4, b"\6\0")
            await client.region_write(PciRegion.BAR0, 0, bytes(4))
            await client.region_read(PciRegion.BAR0, 0x40, 2)
            for _ in range(100):  # and again, where a look came in between
                await client.region_read(PciRegion.BAR0, 4, 4)
            with trio.fail_after(PATIENCE):
                while "the driver polls" not in (log := serving.log.read_text()):
                    await client.region_read(PciRegion.BAR0, 4, 4)
            [line] = [line for line in log.splitlines() if "the driver polls" in line]
            assert "lazy0: the driver polls, and nothing changes: ready (0x0): " in line
            assert line.endswith(" start was written before; the device is at lazy.py:20 in run")

            serving.process.send_signal(signal.SIGUSR1)
            told = json.loads(await lines(report, lambda text: text.endswith("\n")))
            assert (told["device"], told["why"], told["unused"]) == ("lazy0", "SIGUSR1", ["never"])
            assert [(each["offset"], each["bytes"]) for each in told["unmodelled"]] == [(0x40, 2)]
            await client.region_write(PciRegion.BAR0, 8, b"\x21\0\0\0")
        await lines(report, lambda text: text.count("\n") >= 2)
        assert await serving.terminate() == 0
        reports = [json.loads(line) for line in report.read_text().splitlines()]
        assert [each["why"] for each in reports] == ["SIGUSR1", "client gone", "end"]
        traced = trace.read_text()
        assert "REGION_WRITE BAR0+0x0 start = 0x00000000" in traced
        assert "REGION_READ BAR0+0x4 ready = 0x00000000" in traced
        assert "REGION_WRITE BAR0+0x8 never = 0x00000021 (enable=1 mode=2)" in traced
        assert "3 of 3 registers were used; not modelled, 1 kinds: read 2 bytes at BAR0+0x40" in serving.log.read_text()


def test_what_it_says_of_its_options(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(CHIP)
    shown = run_command("list-devices", "lazy.py:Lazy", cwd=tmp_path)
    assert shown.stdout.startswith("lazy.py:Lazy: A chip that is never ready\n")
    assert "burndown=PATH" in shown.stdout
    assert "packed=" not in shown.stdout
    wrong = run_command("serve", "--device", "lazy.py:Lazy,unmodelled=maybe", cwd=tmp_path)
    assert "unmodelled=maybe: expected one of log, zero, ones, error" in wrong.stderr
    assert wrong.returncode == 2
    supervised = run_command("serve", "--supervise", "--device", "lazy.py:Lazy", cwd=tmp_path)
    assert "lazy0: --supervise is for virtio devices" in supervised.stderr
    audited = run_command("serve", "--audit", "--device", "lazy.py:Lazy", cwd=tmp_path)
    assert "--audit is of virtio drivers" in audited.stderr


def test_names_of_registers() -> None:
    names = RegisterNames(Chip)
    assert names(0, 0x04) == "control"
    assert names(0, 0x07) == "control+0x3"
    assert names(0, 0x24) == "scratch[2]"
    assert names(0, 0x134) == "channels[3].address+0x4"
    assert names(0, 0x810) == "ram+0x10"
    assert names(2, 0x00) == "wide"
    assert [names(0, 0x50), names(0, 0xFFF), names(1, 0), names(8, 0)] == [""] * 4
    assert names(PciRegion.CONFIG, 0x04) == "command"
    assert names(PciRegion.CONFIG, 0x40) == ""


def test_fields_of_registers() -> None:
    names = RegisterNames(Chip)
    control = {"enable": 1, "mode": 5, "done": 1}
    assert names.fields(0, 0x04, (0x8000_000B).to_bytes(4, "little")) == control
    assert names.fields(0, 0x04, b"\x1b") == {"enable": 1, "mode": 5, "reserved": 0x10}, "what lies in the byte"
    assert names.fields(0, 0x06, b"\x00\x80") == {"done": 1}
    for offset, data in ((0x02, bytes(4)), (0x04, bytes(8)), (0x00, bytes(4)), (0x500, bytes(4))):
        assert names.fields(0, offset, data) == {}, "not one register with fields"
