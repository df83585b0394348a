"""``vfiouser-virtio probe`` (what it finds out: tests/testing/test_survey.py)."""

import json
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from support.command import run_command, serve_process

from vfiouser_virtio.cli.no_server import has_client
from vfiouser_virtio.vfio_user import connect
from vfiouser_virtio.vm.initramfs import fetch_tools

pytestmark = pytest.mark.once


async def probe(socket_path: str, *options: str) -> str:
    done = await trio.to_thread.run_sync(lambda: run_command("probe", *options, socket_path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def lspci(dump: Path) -> str:
    """What `lspci -F` makes of a dump: the installed one, or that of the guest image."""
    command = [shutil.which("lspci") or "", "-F", str(dump), "-vv", "-n"]
    if not command[0]:
        tools = fetch_tools()
        libraries = next(tools.glob("usr/lib/*/libpci.so.3")).parent
        loader = next(libraries.glob("ld-linux*.so*"))
        command[:1] = [str(loader), "--library-path", str(libraries), str(tools / "usr/bin/lspci")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_three_forms(tmp_path: Path) -> None:
    async with serve_process("--device", "blk,size=1M", folder=tmp_path) as serving:
        (path,) = serving.sockets
        text = await probe(path)
        found = json.loads(await probe(path, "--json"))
        dump = await probe(path, "--lspci")
    assert "config capacity = 2048\n" in text
    assert found["virtio"]["config"]["capacity"] == 2048
    assert "\n00: f4 1a 42 10 " in dump


@pytest.mark.qemu  # not for QEMU: pciutils are fetched where they are not installed
async def test_lspci_reads_it(tmp_path: Path) -> None:
    async with serve_process("--device", "rng", folder=tmp_path) as serving:
        dump = tmp_path / "dump"
        dump.write_text(await probe(serving.sockets[0], "--lspci"))
    shown = lspci(dump)
    assert shown.startswith("00:00.0 00ff: 1af4:1044 (rev 01)")
    for text in ("VirtIO: CommonCfg", "BAR=4 offset=00003000 size=00001000 multiplier=00000004", "Count=2", "FLReset+"):
        assert text in shown


def test_nobody_listens(tmp_path: Path) -> None:
    done = run_command("probe", str(tmp_path / "none"))
    assert done.returncode == 7
    assert done.stderr == f"vfiouser-virtio: cannot connect to '{tmp_path}/none': No such file or directory\n"


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        done = run_command("probe", "--timeout", "0.2", str(tmp_path / "s"))
    assert done.returncode == 7
    assert done.stderr == (
        f"vfiouser-virtio: '{tmp_path}/s': what listens there takes the connection and says nothing: busy, at a "
        "standstill, or no vfio-user server (VERSION: no reply within 0.2 s)\n"
    )


@contextmanager
def answering(path: Path, answer: Callable[[bytes], bytes]) -> Iterator[None]:
    """A server of another kind: what it answers to the first bytes of each client; nothing closes the connection."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    if reply := answer(client.recv(4096)):
                        client.sendall(reply)
                        client.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def http(request: bytes) -> bytes:
    return b"HTTP/1.0 400 Bad Request\r\n\r\n" if request else b""


def vhost_user(request: bytes) -> bytes:
    """GET_FEATURES is answered; anything else ends the connection."""
    return struct.pack("<IIIQ", 1, 5, 8, 1 << 32) if request[:12] == struct.pack("<III", 1, 1, 0) else b""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http, "no vfio-user server: an HTTP server listens there"),
        (vhost_user, "no vfio-user server: a vhost-user back end listens there"),
        (lambda request: b"", "what listens there closes the connection without an answer to VERSION: busy, or no"),
    ],
)
@pytest.mark.parametrize("command", ["probe", "conform"])
def test_a_server_of_another_kind(tmp_path: Path, command: str, answer: Callable[[bytes], bytes], said: str) -> None:
    path = tmp_path / "s"
    with answering(path, answer):
        done = run_command(command, "--timeout", "5", str(path))
    assert done.returncode == 7
    assert done.stdout == ""
    assert done.stderr.startswith(f"vfiouser-virtio: '{path}': {said}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.count(str(path)) == 1


@pytest.mark.parametrize("command", ["probe", "conform"])
async def test_a_busy_server(tmp_path: Path, command: str) -> None:
    async with serve_process("--device", "rng", folder=tmp_path) as serving:
        (path,) = serving.sockets
        async with connect(tmp_path / path):
            done = await trio.to_thread.run_sync(lambda: run_command(command, str(tmp_path / path)))
    assert done.returncode == 7
    assert done.stderr.endswith("the server is busy: another client is connected, and it has one at a time\n")
    assert done.stderr.count(path) == 1


async def test_a_busy_server_elsewhere_has_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel knows of it is the relative name that it was bound to."""
    for name in ("busy", "other"):
        (tmp_path / name).mkdir()
    async with serve_process("--device", "rng,socket=s", folder=tmp_path / "busy"), connect(tmp_path / "busy/s"):
        assert has_client(str(tmp_path / "busy/s"))
        assert not has_client(str(tmp_path / "other/s"))
        (tmp_path / "other/s").touch()
        assert not has_client(str(tmp_path / "other/s"))
        monkeypatch.chdir(tmp_path / "busy")
        assert has_client("s")


def test_a_server_that_is_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()

        def answer() -> None:
            client, _ = listening.accept()
            with client:
                client.sendall(b"220 mail.example.org ESMTP\r\n")
                client.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        done = run_command("probe", str(tmp_path / "s"))
        thread.join()
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
