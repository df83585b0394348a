"""scripts/soak: a short one finds nothing, what is wrong is found, and the report says both."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from support.descriptors import descriptors_of

from vfiouser_virtio import vm
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.soak import kills, visits
from vfiouser_virtio.testing.soak.__main__ import main
from vfiouser_virtio.testing.soak.children import children
from vfiouser_virtio.testing.soak.growth import Growth, HeldSample
from vfiouser_virtio.testing.soak.kills import DiskPlan, KilledDisk
from vfiouser_virtio.testing.soak.linux import LinuxGuests
from vfiouser_virtio.testing.soak.servers import ServerPlan, VisitedServer


def test_a_short_one_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, data = tmp_path / "report.md", tmp_path / "report.json"
    options = ["--minutes", "0.03", "--only", "disks", "--only", "servers", "--seed", "2007"]
    assert main([*options, "--report", str(text), "--json", str(data)]) == 0, capsys.readouterr().out
    assert "0 findings." in text.read_text()
    found = json.loads(data.read_text())
    assert found["disks"]["threads"]["flushed"] > 0
    assert [each["name"] for each in found["servers"]] == ["one process", "process each", "faults"]
    assert sum(each["visits"] + each["killed"] for each in found["servers"]) > 0
    assert found["findings"] == []


async def test_lost_writes_are_found(tmp_path: Path) -> None:
    """A disk that says that writes are flushed, and forgets some at the next reset."""
    plan = DiskPlan("liar", "fault=write-dropped:p=0.5,fault=flush-ignored")
    async with children() as processes:
        result = await KilledDisk(processes, tmp_path, plan, seed=1, flushes=500).run(("guest",))
    assert "lost" in "".join(result.complaints)


async def test_what_a_guest_waits_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not give a request back; and a machine that is slow, on which something still goes on."""
    monkeypatch.setattr(kills, "PATIENCE", 6.0)
    plan = DiskPlan("silent", "fault=used-never:after=9", depth=1)
    async with children() as processes:
        result = await KilledDisk(processes, tmp_path, plan, seed=1, flushes=5000).run(("guest",))
    [complaint] = result.complaints
    assert "nothing goes on for 6.0 s" in complaint
    assert "nothing has ended for 2 s; waits for " in complaint


async def test_a_device_that_fails_its_visitors_is_found(tmp_path: Path) -> None:
    plan = ServerPlan("liar", (("blk", "size=1M,fault=io-error:p=1"),))
    async with children() as processes:
        server = VisitedServer(processes, tmp_path, plan, seed=1)
        await server.run(lambda: False)
    assert "broken: blk" in server.result.complaints[0]


async def test_what_a_server_keeps_for_good_is_there_after_a_good_visitor(tmp_path: Path) -> None:
    """An eventfd for each queue, which hostile clients ask for at times, and QEMU: later it would look like a leak."""

    def eventfds() -> int:
        return sum(each.endswith("[eventfd]") for each in descriptors_of(server.pid).values())

    path = str(tmp_path / "net.sock")
    log = tmp_path / "log"
    async with children() as processes:
        device = f"net,hub=kept,queues=2,socket={path}"
        server = await processes.start("vfiouser_virtio.cli:main", ["serve", "--device", device], log=log)
        await visits.visit_once("good", "net", path)
        async with visits.connected(path) as (client, _):
            before = eventfds()  # what was the visitor's has gone: one client comes after the other
            reply = await client.call(Command.DEVICE_GET_REGION_IO_FDS, visits.IO_FDS)
        assert reply is not None
        assert not reply.error
        after = eventfds()
        await server.kill_family()
    assert before == after > 0


def test_growth_is_found() -> None:
    usual = HeldSample(memory=30 << 20, fds=40, mappings=300, processes=1)
    # With clients there is more, now and then.
    run = [replace(usual, fds=40 + at % 9, memory=usual.memory + (at % 7 << 20)) for at in range(200)]
    growth = Growth.of(run)
    assert growth is not None
    assert growth.complaints() == []
    for name, step in (("fds", 1), ("memory", 100_000), ("mappings", 1)):
        grown = [replace(each, **{name: getattr(each, name) + step * at}) for at, each in enumerate(run)]
        growth = Growth.of(grown)
        assert growth is not None
        assert growth.complaints()[0].startswith(f"{name} grew from ")
    assert Growth.of(run[:50]) is None


def test_a_mistake_of_the_user_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--minutes", "1", "--report", str(tmp_path / "none" / "report.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("VFIOUSER_VIRTIO_QEMU", str(tmp_path / "none"))
    assert main(["--minutes", "1", "--only", "linux"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_the_soaks_own_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(VisitedServer):
        async def run(self, is_over: Callable[[], bool]) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vfiouser_virtio.testing.soak.__main__.VisitedServer", Full)
    text = tmp_path / "report.md"
    assert main(["--minutes", "1", "--only", "servers", "--report", str(text)]) == 1
    assert "No space left on device" in text.read_text()


def test_sigterm_ends_it_as_ctrl_c_does(tmp_path: Path) -> None:
    """As by timeout(1): the report of hours was lost, and its folder left behind."""
    command = [sys.executable, "-m", "vfiouser_virtio.testing.soak", "--minutes", "60", "--only", "servers"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(visits.__file__).parents[3])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("seed ")
        while not list(tmp_path.glob("soak-*/server-0/server.log")):
            time.sleep(0.01)
        process.terminate()
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "0 findings." in said
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


async def test_children_end_with_what_they_are_forked_from(tmp_path: Path) -> None:
    """Who kills one then waits for no word of it, in a part that cannot be cancelled: that was for ever."""
    killed = False

    async def lose() -> None:
        nonlocal killed
        async with children() as processes:
            child = await processes.start("time:sleep", 600, log=tmp_path / "log")
            forked_from = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(forked_from, signal.SIGKILL)
            try:
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(60, shield=True):
                    await child.kill_family()
                    killed = True

    with pytest.raises(RuntimeError, match="has ended"):
        await lose()
    assert killed


@pytest.mark.qemu
@pytest.mark.variant
async def test_linux_guests_that_are_killed(tmp_path: Path, qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    async with children() as processes:
        guests = LinuxGuests(processes, tmp_path, seed=5)
        for _ in range(2):
            await guests.guest()
        await guests.close()
    assert guests.result.complaints == []
    assert guests.result.guests == 2
    assert guests.result.steps > 0
