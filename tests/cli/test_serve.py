"""``serve`` as its users have it: its output, its sockets, its end; the same with one process or many."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from support.command import COMMAND, Process, environment, run_command, serve_process
from support.connecting import raw_client, wait_unserved

from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import RawClient

How = tuple[str, ...]


@pytest.fixture(params=[(), ("--processes",)], ids=["one-process", "processes"])
def how(request: pytest.FixtureRequest) -> How:
    options: How = request.param
    return options


async def greet(path: str) -> RawClient:
    client = raw_client(path)
    try:
        reply = await client.version()
    except BaseException:
        client.close()
        raise
    assert (reply.command, reply.error) == (Command.VERSION, 0)
    return client


async def listening(path: str) -> None:
    """Wait until somebody listens at ``path``: the file is there from bind() on, listen() comes after it."""
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                return
        await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("device", "status", "words"),
    [
        ("blk,path=/nonexistent", 4, "/nonexistent"),
        ("blk,pat=x", 2, 'blk: no option "pat"; did you mean "path"?'),
        ("nosuch", 2, 'no device "nosuch"'),
        ("rgn", 2, 'no device "rgn"; did you mean "rng"?'),
        ("blk,size=12x", 2, "blk: size=12x: expected a size"),
        ("blk", 4, "blk"),
        ("my_device.py:Mine", 2, "my_device.py: No such file"),
        ("rng,socket=/nonexistent/a.sock", 3, "/nonexistent/a.sock"),
        ("rng,socket=" + "x" * 200, 3, "107"),
        ("{", 2, "bad JSON"),
    ],
)
def test_a_mistake_is_one_line(how: How, tmp_path: Path, device: str, status: int, words: str) -> None:
    ended = run_command("serve", *how, "--device", device, cwd=tmp_path, XDG_RUNTIME_DIR=str(tmp_path))
    assert ended.returncode == status
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("vfiouser-virtio: ")
    assert words in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_verbose_shows_the_traceback(how: How, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    quiet = run_command("serve", *how, "--device", "bad.py:Mine", cwd=tmp_path)
    verbose = run_command("serve", *how, "--device", "bad.py:Mine", "-v", cwd=tmp_path)
    assert quiet.returncode == verbose.returncode == 2
    assert "ZeroDivisionError" in quiet.stderr
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in verbose.stderr


async def test_serve_connect_and_terminate(how: How, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    async with serve_process(
        *how, "--device", "blk,path=disk.img", "--device", "rng", folder=tmp_path, env=runtime
    ) as served:
        assert [line.split(" ")[:3] for line in served.lines[:2]] == [
            ["device", "blk0", "blk"],
            ["device", "rng0", "rng"],
        ]
        assert served.lines[-1] == "ready 2"
        folder = Path(served.sockets[0]).parent
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(served.sockets[0]).stat().st_mode) == 0o600
        first, second = await greet(served.sockets[0]), await greet(served.sockets[1])
        # While clients are connected, and at once.
        assert await served.terminate() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]
        await first.no_more()
        first.close()
        second.close()
        assert "Traceback" not in served.log.read_text()


async def test_the_printed_arguments_are_for_a_shell(how: How, tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    async with serve_process(*how, "--device", "rng,socket=a.sock", folder=folder) as served:
        text = "\n".join(line for line in served.lines if not line.startswith(("device ", "ready ", "#")))
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    qemu.chmod(0o755)
    ended = await trio.run_process(["sh", "-c", text], capture_stdout=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    words = ended.stdout.decode().splitlines()
    assert "memory-backend-memfd,id=mem,size=1G,share=on" in words
    assert json.loads(words[-1]) == {
        "driver": "vfio-user-pci",
        "id": "rng0",
        "socket": {"type": "unix", "path": f"{folder}/a.sock"},
    }


async def test_json_output_and_given_sockets(how: How, tmp_path: Path) -> None:
    arguments = ["--device", "rng", "--device", "rng,id=mine,socket=own.sock", "--device", "rng"]
    sockets = ["--socket", "one.sock", "--socket", "two.sock"]
    async with serve_process(*how, *arguments, *sockets, "--json", folder=tmp_path) as served:
        events = [json.loads(line) for line in served.lines]
        (await greet(str(tmp_path / "two.sock"))).close()
    assert [event["event"] for event in events] == ["device", "device", "device", "ready"]
    assert [Path(event["socket"]).name for event in events[:3]] == ["one.sock", "own.sock", "two.sock"]
    assert events[1]["qemu-device"]["id"] == "mine"
    assert events[3] == {"event": "ready", "devices": 3}


async def test_a_socket_in_use_and_a_stale_one(how: How, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with serve_process(*how, "--device", "rng", "--socket", path, folder=tmp_path) as served:
        ended = run_command("serve", *how, "--device", "rng", "--socket", path)
        assert ended.returncode == 3
        assert ended.stderr.count("\n") == 1
        (await greet(path)).close()
        served.process.kill()
        await served.wait()
        assert os.path.exists(path)
        await wait_unserved(path)  # the process of a device ends a moment after its parent
    async with serve_process(*how, "--device", "rng", "--socket", path, folder=tmp_path) as served:
        (await greet(path)).close()
        assert await served.terminate() == 0
    assert not os.path.exists(path)


async def test_one_client_after_another_or_only_once(how: How, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with serve_process(*how, "--device", "rng", "--socket", path, folder=tmp_path) as served:
        for _ in range(50):  # each comes while the last one's leaving is dealt with
            (await greet(path)).close()
        assert served.process.returncode is None
    async with serve_process(*how, "--device", "rng", "--socket", path, "--once", folder=tmp_path) as served:
        client = await greet(path)
        with pytest.raises(ConnectionRefusedError):
            raw_client(path)
        client.close()
        assert await served.wait() == 0


async def test_ready_fd_and_notify_socket(how: How, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(60)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with serve_process(
            *how, "--device", "rng", "--ready-fd", str(writer), folder=tmp_path, env=env, pass_fds=[writer]
        ):
            os.close(writer)
            assert notified.recv(100) == b"READY=1"
            # To the end: the server has closed it.
            async with trio.lowlevel.FdStream(reader) as ready:
                assert b"".join([data async for data in ready]) == b"ready\n"
    assert run_command("serve", *how, "--device", "rng", "--ready-fd", "77").returncode == 2


async def test_a_service_manager_hears_that_it_is_alive_and_stops(how: How, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(60)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        async with serve_process(*how, "--device", "rng", folder=tmp_path, env=env) as served:
            assert [notified.recv(100) for _ in range(4)] == [b"READY=1"] + [b"WATCHDOG=1"] * 3
            served.process.terminate()
            while (heard := notified.recv(100)) == b"WATCHDOG=1":
                pass
            assert heard == b"STOPPING=1"
        # It is another process that is watched.
        async with serve_process(*how, "--device", "rng", folder=tmp_path, env={**env, "WATCHDOG_PID": "1"}) as served:
            assert notified.recv(100) == b"READY=1"
            await trio.sleep(0.5)
            served.process.terminate()
            assert notified.recv(100) == b"STOPPING=1"


async def test_an_inherited_listening_socket(how: How, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        fd = listening.fileno()
        async with serve_process(*how, "--device", "rng", "--fd", str(fd), folder=tmp_path, pass_fds=[fd]) as served:
            assert served.sockets == [path]
            (await greet(path)).close()
            assert await served.terminate() == 0
    assert os.path.exists(path)  # it is not ours


async def test_an_inherited_connection_ends_with_its_client(how: How, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        async with serve_process(*how, "--device", "rng", "--fd", str(fd), folder=tmp_path, pass_fds=[fd]) as served:
            theirs.close()
            assert served.sockets == [f"fd:{fd}"]
            client = RawClient(ours)
            assert (await client.version()).error == 0
            client.close()
            assert await served.wait() == 0


def test_systemd_gives_sockets(how: How, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        # What systemd does: the socket is fd 3, and LISTEN_PID is the process itself.
        as_systemd = f"""import os, sys
os.dup2({listening.fileno()}, 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[1], sys.argv[1:])"""
        command = [sys.executable, "-c", as_systemd, *COMMAND, "serve", *how, "--device", "rng"]
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[listening.fileno()]
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().decode() == f"device rng0 rng {path}\n"
            process.terminate()
            assert process.wait(60) == 0


def test_more_sockets_than_devices(how: How, tmp_path: Path) -> None:
    ended = run_command("serve", *how, "--device", "rng", "--socket", "a", "--socket", "b", cwd=tmp_path)
    assert ended.returncode == 2
    assert "1 more sockets than devices" in ended.stderr
    assert list(tmp_path.iterdir()) == []


async def test_config_file_and_device_file(how: How, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from vfiouser_virtio.virtio import Device, queue\n"
        "class Mine(Device):\n"
        "    device_id = 42\n"
        "    requestq = queue()\n"
        "    def __init__(self, *, word: str) -> None:\n"
        "        super().__init__()\n"
        "        print('word', word)\n"
    )
    (tmp_path / "devices.toml").write_text(
        '[[device]]\ndriver = "mine.py:Mine"\nword = "hello"\nsocket = "mine.sock"\n'
        '[[device]]\ndriver = "blk"\nsize = "1M"\nreadonly = true\nsocket = "blk.sock"\n'
    )
    async with serve_process(*how, "--config", "devices.toml", folder=tmp_path) as served:
        assert "word hello" in served.lines
        assert f"device mine0 mine.py:Mine {tmp_path}/mine.sock" in served.lines
        (await greet(f"{tmp_path}/mine.sock")).close()
        (await greet(f"{tmp_path}/blk.sock")).close()


async def test_a_reader_that_goes_away_is_no_reason_to_end(how: How, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    reader, writer = os.pipe()
    os.close(reader)
    process = Process(
        [*COMMAND, "serve", *how, "--device", "rng", "--socket", path],
        env=environment(),
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    with trio.fail_after(60):
        await listening(path)
        (await greet(path)).close()
        process.terminate()
        assert await process.wait() == 0
