"""``serve --engine libvfio-user``: as `serve` with our own engine, and its mistakes in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from support.command import COMMAND, environment, run_command, serve_process
from support.libvfio_user_found import find

from vfiouser_virtio.libvfio_user.bindings import Library
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import RawClient

LIBRARY = ("--engine", "libvfio-user")


@pytest.fixture(scope="session")
def library() -> Library:
    library, reason = find()
    if library is None:
        pytest.skip(reason)
    return library


@pytest.fixture(params=[(), ("--processes",)], ids=["one-process", "processes"])
def how(request: pytest.FixtureRequest) -> tuple[str, ...]:
    options: tuple[str, ...] = request.param
    return options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*LIBRARY, "--libvfio-user", "/nonexistent.so"), "there is no /nonexistent.so"),
        ((*LIBRARY, "--libvfio-user", "/etc/hostname"), "/etc/hostname"),
        (("--libvfio-user", "/x.so"), "which was not asked for"),
        ((*LIBRARY, "--write-multiple"), "libvfio-user does not know REGION_WRITE_MULTI"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    ended = run_command("serve", *options, "--device", "rng", cwd=tmp_path, XDG_RUNTIME_DIR=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_iommu_is_refused(library: Library, how: tuple[str, ...], tmp_path: Path) -> None:
    ended = run_command("serve", *LIBRARY, *how, "--device", "rng,iommu-platform=on", cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "rng0: iommu-platform=on: not with libvfio-user" in ended.stderr


def test_run_refuses_private_memory() -> None:
    ended = run_command("run", *LIBRARY, "--memory", "private", "--device", "rng", "--exec", "true")
    assert ended.returncode == 2
    assert "libvfio-user reaches only memory that is shared" in ended.stderr


def test_an_inherited_socket_is_refused(library: Library) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        ended = subprocess.run(
            [*COMMAND, "serve", *LIBRARY, "--fd", str(listening.fileno()), "--device", "rng"],
            env=environment(),
            pass_fds=[listening.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "libvfio-user binds its sockets itself" in ended.stderr


def test_systemds_socket_is_refused(library: Library, tmp_path: Path) -> None:
    starter = (
        "import os, socket, sys\n"
        "listening = socket.socket(socket.AF_UNIX)\n"
        "listening.bind('a.sock')\n"
        "listening.listen()\n"
        "os.dup2(listening.fileno(), 3)\n"
        "os.set_inheritable(3, True)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'vfiouser_virtio', *sys.argv[1:]])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", starter, "serve", *LIBRARY, "--device", "rng"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "no socket of systemd's with --engine libvfio-user" in ended.stderr


async def test_serve_connect_and_terminate(library: Library, how: tuple[str, ...], tmp_path: Path) -> None:
    async with serve_process(
        *LIBRARY,
        *how,
        "--device",
        "blk,size=1M",
        "--device",
        "rng",
        folder=tmp_path,
        env={"XDG_RUNTIME_DIR": str(tmp_path)},
    ) as served:
        assert served.lines[-1] == "ready 2"
        clients = []
        for path in served.sockets:
            assert os.stat(path).st_mode & 0o777 == 0o600
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            clients.append(RawClient(sock))
            assert (await clients[-1].version()).error == 0
        for client in clients:
            assert (await client.call(Command.DEVICE_RESET)).error == 0
        assert await served.terminate() == 0
        for client in clients:
            await client.no_more()
            client.close()
        assert list(tmp_path.iterdir()) == []
        assert "Traceback" not in served.log.read_text()


async def test_once_ends_with_the_client(library: Library, how: tuple[str, ...], tmp_path: Path) -> None:
    async with serve_process(*LIBRARY, *how, "--once", "--device", "rng,socket=a.sock", folder=tmp_path) as served:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "a.sock"))
        client = RawClient(sock)
        await client.version()
        client.close()
        with trio.fail_after(60):
            assert await served.wait() == 0
    assert list(tmp_path.iterdir()) == []


async def test_a_stale_socket_is_replaced(library: Library, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "a.sock"))
    async with serve_process(*LIBRARY, "--device", "rng,socket=a.sock", folder=tmp_path) as served:
        ended = await trio.to_thread.run_sync(
            lambda: run_command("serve", *LIBRARY, "--device", "rng,socket=a.sock", cwd=tmp_path)
        )
        assert (ended.returncode, ended.stderr.count("\n")) == (3, 1)
        assert "another server does" in ended.stderr
        assert await served.terminate() == 0
