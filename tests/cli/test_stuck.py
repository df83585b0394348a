"""A device that never yields: it is said where it is, and ``serve`` ends all the same."""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.command import ServeProcess, environment, serve_process
from support.processes import is_gone, wait_until_gone
from support.stuck import DEVICE

from vfiouser_virtio.parent_death import ending_with_us
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import RawClient


def log_of(served: ServeProcess) -> str:
    return served.log.read_text()


async def wait_for(text: str, served: ServeProcess) -> None:
    with trio.fail_after(60):
        while text not in log_of(served):
            await trio.sleep(0.02)


@asynccontextmanager
async def stuck(
    folder: Path, how: str, *options: str, env: Mapping[str, str] | None = None, sign: str = "has not yielded for"
) -> AsyncIterator[ServeProcess]:
    """A server whose device is stuck, and has been seen to be."""
    (folder / "mine.py").write_text(DEVICE)
    # Not in pytest's folder, whose path can be longer than a socket's may be.
    with tempfile.TemporaryDirectory(prefix="stuck-") as short:
        device = ["--device", f"mine.py:Stuck,id=mine0,how={how}", "--device", "rng"]
        runtime = {"XDG_RUNTIME_DIR": short, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        async with serve_process(*device, *options, folder=folder, env=runtime) as served:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(served.sockets[0])
            client = RawClient(connection)
            await client.version()
            await client.send(client.request(Command.DEVICE_RESET))
            if sign:
                await wait_for(sign, served)
            try:
                yield served
            finally:
                client.close()
        assert os.listdir(short) == [] or served.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("how", "options", "number", "end"),
    [
        ("loops", (), signal.SIGTERM, "interrupted mine0"),
        ("sleeps", (), signal.SIGINT, "interrupted mine0"),
        ("catches", (), signal.SIGTERM, "ended without mine0"),
        ("loops", ("--processes",), signal.SIGINT, "interrupted mine0"),
    ],
)
async def test_it_is_said_where_and_a_signal_ends_it(
    tmp_path: Path, how: str, options: tuple[str, ...], number: signal.Signals, end: str
) -> None:
    async with stuck(tmp_path, how, *options) as served:
        said = log_of(served)
        assert "mine0: has not yielded for 1 s" in said
        assert f'mine.py", line {DEVICE[: DEVICE.index(f"def {how}")].count(chr(10)) + 2}' in said or how == "catches"
        assert f", in {how}\n" in said
        assert "trio" not in said  # only the author's lines
        served.process.send_signal(number)
        assert await served.wait() == (1 if options else 128 + number), log_of(served)
        said = log_of(served)
        # The processes get SIGTERM, whatever their parent has got.
        assert f"{signal.SIGTERM.name if options else number.name}: {end}, which did not yield at " in said
        assert f" in {how}\n" in said
        assert "Traceback" not in said


def tell_another_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal to a thread that takes it, and is not the one in which Python's handlers run."""
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        blocked = int(status.partition("SigBlk:\t")[2].split()[0], 16)
        if thread != pid and not blocked & 1 << number - 1:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.tgkill(pid, thread, int(number)) == 0, os.strerror(ctypes.get_errno())
            return
    raise AssertionError("all others block it")


async def test_the_kernel_gives_the_signal_to_another_thread(tmp_path: Path) -> None:
    """So the call in which the device is goes on, and Python's handler does not run until that is interrupted."""
    async with stuck(tmp_path, "sleeps") as served:
        tell_another_thread(served.process.pid, signal.SIGINT)
        assert await served.wait() == 128 + signal.SIGINT, log_of(served)
        assert "SIGINT: interrupted mine0, which did not yield at " in log_of(served)


async def test_c_code_that_looks_for_signals_is_interrupted(tmp_path: Path) -> None:
    """It holds the interpreter's lock, so that nothing is said of it before the signal."""
    async with stuck(tmp_path, "searches", sign="") as served:
        with trio.fail_after(60):
            while not (tmp_path / "searching").exists():
                await trio.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        assert await served.wait() == 128 + signal.SIGTERM
        said = log_of(served)
        assert "SIGTERM: interrupted mine0, which did not yield at " in said
        assert " in searches\n" in said
        assert "give_turn" not in said
        assert "Traceback" not in said


async def test_c_code_that_holds_the_lock_is_shown_and_ended_by_its_parent(tmp_path: Path) -> None:
    async with stuck(tmp_path, "holds_the_lock", "--processes", sign="most recent call first") as served:
        await wait_for("mine.py", served)
        said = log_of(served)
        line = DEVICE[: DEVICE.index("def holds_the_lock")].count("\n") + 2
        assert "\nTimeout (0:00:05)!\n" in f"\n{said}"  # others may have said something before, or not yet
        assert f'mine.py", line {line} in holds_the_lock\n' in said
        assert await served.terminate() == 1
        assert "mine0: its process was ended by SIGKILL" in log_of(served)


async def test_a_device_that_comes_back(tmp_path: Path) -> None:
    async with stuck(tmp_path, "comes_back") as served:
        await wait_for("the event loop goes on", served)
        assert await served.terminate() == 0


async def test_a_service_manager_hears_nothing_of_it(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        async with stuck(tmp_path, "sleeps", env=env):
            # What it has said before; a busy machine may be stuck before it has said anything.
            while select.select([notified], [], [], 1)[0]:
                notified.recv(100)


async def test_a_second_signal_is_impatient(tmp_path: Path) -> None:
    async with stuck(tmp_path, "sleeps") as served:
        for _ in range(2):
            served.process.send_signal(signal.SIGTERM)
            await trio.sleep(0.05)
        assert await served.wait() == 128 + signal.SIGTERM


async def test_a_stuck_process_does_not_outlive_its_parent(tmp_path: Path) -> None:
    async with stuck(tmp_path, "loops", "--processes") as served:
        pid = served.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 2
        served.process.kill()
        wait_until_gone(*map(int, children))


def test_any_program_can_be_made_to_end_with_us() -> None:
    code = """
import subprocess, sys, time
from vfiouser_virtio.parent_death import ending_with_us
print(subprocess.Popen(ending_with_us(["sleep", "3600"])).pid, flush=True)
time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        # It is the program itself, under the number of the one that was started.
        while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
            assert not is_gone(child)
        assert not is_gone(child)
        parent.kill()
        for _ in range(6000):
            if is_gone(child):
                return
            parent.poll()
            os.sched_yield()
            signal.sigtimedwait([], 0.01)
    pytest.fail("it is still there")


def test_who_has_lost_its_parent_already_does_not_begin(tmp_path: Path) -> None:
    command = ending_with_us(["touch", str(tmp_path / "begun")])
    command[3] = "1"  # somebody else's
    assert subprocess.run(command, timeout=60, check=False).returncode == 1
    assert list(tmp_path.iterdir()) == []
