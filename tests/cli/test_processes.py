"""``serve --processes``: what only it has to do. What it shares with one process for all is in test_serve.py."""

import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from support.command import ServeProcess, run_command, serve_process
from support.connecting import raw_client
from support.processes import is_gone

from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.vfio_user import SharedMemory, connect

# `reset` and the constructor run in the event loop of the device's process.
DEVICES = """\
import os, time
from vfiouser_virtio.virtio import Device, queue

class Stuck(Device):
    device_id = 42
    requestq = queue()
    def reset(self):
        while not os.path.exists("go on"):
            time.sleep(0.01)

class Broken(Device):
    device_id = 43
    requestq = queue()
    def __init__(self):
        raise RuntimeError("as it is")
"""


def children(served: ServeProcess) -> dict[str, int]:
    """The device processes that are there, by the name that top shows."""
    pid = served.process.pid
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {Path(f"/proc/{child}/comm").read_text().strip(): int(child) for child in pids}


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def test_a_busy_device_does_not_slow_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DEVICES)
    async with serve_process("--processes", "--device", "mine.py:Stuck", "--device", "rng", folder=tmp_path) as served:
        stuck, neighbour = map(raw_client, served.sockets)
        await stuck.version()
        await stuck.send(stuck.request(Command.DEVICE_RESET))
        await neighbour.version()
        assert (await neighbour.call(Command.DEVICE_RESET)).error == 0
        await stuck.silence()
        (tmp_path / "go on").touch()
        assert (await stuck.receive()).error == 0
        stuck.close()
        neighbour.close()


async def test_a_child_has_only_what_is_its_own(tmp_path: Path) -> None:
    alone = ["--processes", "--device", "rng"]
    reader, writer = os.pipe()
    async with serve_process(*alone, folder=tmp_path) as served:
        expected = len(os.listdir(f"/proc/{children(served)['rng0']}/fd"))
    async with serve_process(
        *alone, "--device", "rng", "--device", "rng", "--ready-fd", str(writer), folder=tmp_path, pass_fds=[writer]
    ) as served:
        found = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in children(served).items()}
    os.close(reader)
    os.close(writer)
    assert found == {"rng0": expected, "rng1": expected, "rng2": expected}


async def test_one_that_dies_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    devices = ["--device", "rng,id=first,socket=first.sock", "--device", "rng,id=second,socket=second.sock"]
    async with serve_process("--processes", *devices, folder=tmp_path) as served:
        os.kill(children(served)["first"], signal.SIGKILL)
        await wait_until(lambda: "first: its process was ended by SIGKILL" in served.log.read_text())
        assert children(served).keys() == {"second"}  # and no zombie
        with pytest.raises(ConnectionRefusedError):
            raw_client(served.sockets[0])
        client = raw_client(served.sockets[1])
        assert (await client.version()).error == 0
        client.close()
        assert await served.terminate() == 1
        assert "first" in served.log.read_text().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


async def test_none_outlives_its_parent(tmp_path: Path) -> None:
    async with serve_process("--processes", "--device", "rng", "--device", "rng", folder=tmp_path) as served:
        pids = children(served).values()
        client = raw_client(served.sockets[0])
        await client.version()
        served.process.kill()
        await wait_until(lambda: all(is_gone(pid) for pid in pids))
        await client.no_more()
        client.close()


async def test_a_hub_joins_devices_of_several_processes(tmp_path: Path) -> None:
    """The third is isolated, as the second is: each of them reaches only the first."""
    devices = ("net,hub=lan", "net,hub=lan,isolated=on", "net,hub=lan,isolated=on", "net,hub=other")
    options = [word for device in devices for word in ("--device", device)]
    async with serve_process("--processes", *options, folder=tmp_path) as served, AsyncExitStack() as stack:
        guests = []
        for path in served.sockets:
            memory = stack.enter_context(SharedMemory(16 << 20))
            client = await stack.enter_async_context(connect(path, memory=[memory]))
            guests.append((await stack.enter_async_context(bound_pci(client))).driver_data)
        macs = [guest.mac for guest in guests]

        async def reach(sender: int, *receivers: int) -> None:
            frame = b"\xff" * 6 + macs[sender] + b"\x88\xb5" + bytes([sender]) * 50
            await guests[sender].send(frame)
            for receiver in receivers:
                assert (await guests[receiver].receive()).data == frame

        with trio.fail_after(60):
            await reach(0, 1, 2)
            await reach(1, 0)
            await reach(2, 0)
            answer = macs[1] + macs[0] + b"\x88\xb5" + b"only for one"
            await guests[0].send(answer)
            assert (await guests[1].receive()).data == answer
        await trio.sleep(0.2)
        assert not any(guest.receive_nowait() for guest in guests)


async def test_a_terminal_interrupts_all_of_them(tmp_path: Path) -> None:
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    async with serve_process(
        "--processes", "--device", "rng", "--device", "rng", folder=tmp_path, env=runtime
    ) as served:
        pids = [*children(served).values(), served.process.pid]
        # A terminal sends it to all of them at once, which one call after another is not on a busy machine.
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
        assert (await served.wait(), served.log.read_text()) == (0, "")
    assert list(tmp_path.iterdir()) == []


async def test_it_ends_when_its_last_device_has(tmp_path: Path) -> None:
    async with serve_process("--processes", "--device", "rng", "--device", "rng", folder=tmp_path) as served:
        for pid in children(served).values():
            os.kill(pid, signal.SIGABRT)
        assert await served.wait() == 1


def test_a_device_that_cannot_be_made_ends_all(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DEVICES)
    devices = ["--device", "rng,socket=a.sock", "--device", "mine.py:Broken"]
    ended = run_command("serve", "--processes", *devices, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (4, "")
    [line] = ended.stderr.splitlines()
    assert line.endswith("mine.py:15: __init__ raised RuntimeError: as it is")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py"}


async def test_one_process_may_have_the_terminal(tmp_path: Path) -> None:
    console = ["--device", "console,chardev=stdio"]
    async with serve_process("--processes", *console, "--device", "rng", folder=tmp_path) as served:
        assert "# console0 on the host: stdio" in served.lines
    one, many = (run_command("serve", *how, *console, *console) for how in ((), ("--processes",)))
    assert many.returncode == one.returncode == 2
    assert many.stderr == one.stderr
    assert many.stderr.count("\n") == 1
