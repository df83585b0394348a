"""Faults are stopped and started while a device is served: in Python, and by lines in a FIFO."""

import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from support.command import run_command, serve_process

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.control import MAX_LINE, FaultControl
from vfiouser_virtio.guest import DeviceBroken, bound_pci
from vfiouser_virtio.vfio_user import SharedMemory, connect


def test_one_of_several_faults() -> None:
    lines: list[str] = []
    plan = FaultPlan(["used-never", "used-len-long:every=2", "used-len-long:at=1"], seed=1, write=lines.append)

    def happens(name: str) -> bool:
        hit = plan.hit(name, 0)
        if hit is not None:
            hit.did("it did")
        return hit is not None

    assert [happens("used-never"), happens("used-len-long")] == [True, True]
    for _ in range(2):
        plan.stop("used-len-long")
    assert [happens("used-len-long"), happens("used-never")] == [False, True]
    plan.stop()
    assert not happens("used-never")
    plan.start("used-len-long")
    assert not happens("used-len-long")
    plan.start()
    # What was stopped was counted: this is the fourth.
    assert happens("used-len-long")
    assert plan.status() == (
        "faults happen: used-never 2 times; used-len-long:every=2 1 times; used-len-long:at=1 1 times"
    )
    events = [(said.get("event"), said.get("name")) for said in map(json.loads, lines) if "event" in said]
    assert events == [
        ("stopped", "used-len-long"), ("stopped", None), ("started", "used-len-long"), ("started", None),
    ]  # fmt: skip
    assert "stopped used-len-long" in plan.log.text()
    with pytest.raises(ConfigError, match="no fault 'used-nver' was asked for, only used-never, used-len-long"):
        plan.stop("used-nver")


@asynccontextmanager
async def controlled(folder: Path, *faults: str) -> AsyncIterator[tuple[FaultPlan, Callable[[bytes], None]]]:
    """A plan, and what writes to its FIFO."""
    path = folder / "faults.ctl"
    os.mkfifo(path)
    plan = FaultPlan(faults, seed=1)
    with FaultControl(path, plan, "blk0") as control, path.open("wb", buffering=0) as writer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve)
            yield plan, lambda data: (writer.write(data), None)[1]
            nursery.cancel_scope.cancel()


async def test_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with controlled(tmp_path, "used-never") as (plan, write):
        for data, running in [
            (b"stop\n", False),
            (b"start", False),
            (b"\n\n", True),
            (b"stop\r\nstart\nstop\n", False),
        ]:
            write(data)
            await trio.testing.wait_all_tasks_blocked()
            assert plan.running is running
        write(b"start\nstop used-never\n")
        await trio.testing.wait_all_tasks_blocked()
        assert plan.running
        assert plan.hit("used-never", 0) is None
        caplog.clear()
        write(b"status\nstop used-nver\nstop all of it\nhalt \x1b[31m\n" + b"x" * 2 * MAX_LINE + b"\n")
        await trio.testing.wait_all_tasks_blocked()
        assert [record.getMessage() for record in caplog.records] == [
            "blk0: faults happen: used-never 0 times, stopped",
            "blk0: fault-control: no fault 'used-nver' was asked for, only used-never",
            "blk0: fault-control: 'stop all of it': expected stop, start, stop NAME, start NAME, status",
            "blk0: fault-control: 'halt \\x1b[31m': expected stop, start, stop NAME, start NAME, status",
            f"blk0: fault-control: '{'x' * 80}…': expected stop, start, stop NAME, start NAME, status",
        ]


async def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with controlled(tmp_path, "used-never") as (plan, write):
        for _ in range(100):
            write(b"stop" * 1000)
            await trio.testing.wait_all_tasks_blocked()
        write(b"\nstop\n")
        await trio.testing.wait_all_tasks_blocked()
        assert not plan.running
    assert len(caplog.records) == 1
    assert len(caplog.text) < 1000


def test_what_is_no_fifo(tmp_path: Path) -> None:
    plan = FaultPlan(["used-never"])
    with pytest.raises(DeviceError, match=r"faults.ctl: No such file or directory: make it with mkfifo"):
        FaultControl(tmp_path / "faults.ctl", plan, "blk0")
    (tmp_path / "file").write_text("stop\n")
    with pytest.raises(DeviceError, match="file is no FIFO"):
        FaultControl(tmp_path / "file", plan, "blk0")


def test_options_without_a_fault() -> None:
    ended = run_command("serve", "--device", "rng,fault-stopped")
    assert ended.returncode == 2
    assert "fault-control and fault-stopped are for fault=NAME, and there is none" in ended.stderr


@pytest.mark.parametrize("processes", [[], ["--processes"]])
async def test_a_command_whose_faults_are_started_later(tmp_path: Path, processes: list[str]) -> None:
    os.mkfifo(tmp_path / "faults.ctl")
    device = "rng,fault=used-len-long,fault-control=faults.ctl,fault-stopped,fault-log=faults.jsonl"
    async with serve_process(*processes, "--device", device, folder=tmp_path) as server:

        async def say(line: str, answer: str) -> None:
            (tmp_path / "faults.ctl").write_text(f"{line}\n")
            with trio.fail_after(120):
                while answer not in server.log.read_text():
                    await trio.sleep(0.01)

        with SharedMemory(16 << 20) as memory:
            async with connect(server.sockets[0], memory=[memory]) as client, bound_pci(client) as found:
                await found.driver_data.read(16)
                await say("start", "faults happen: used-len-long 0 times")
                with pytest.raises(DeviceBroken, match="used length"):
                    await found.driver_data.read(16)
                await say("stop", "faults are stopped: used-len-long 1 times")
        assert await server.terminate() == 0
    said = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [entry.get("event", entry.get("fault")) for entry in said[1:]] == ["started", "used-len-long", "stopped"]
