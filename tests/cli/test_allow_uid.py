"""``serve --allow-uid``: whose clients a server takes, whichever of its processes accepts them."""

import os
import pwd
import socket
from pathlib import Path

import pytest
import trio
from support.command import run_command, serve_process
from support.connecting import raw_client

from vfiouser_virtio.testing.raw.client import RawClient

pytestmark = pytest.mark.once
US = os.geteuid()


@pytest.mark.parametrize("how", [(), ("--processes",), ("--supervise",)], ids=["one", "processes", "supervise"])
async def test_other_users_are_refused(how: tuple[str, ...], tmp_path: Path) -> None:
    options = [*how, "--device", "rng", "--log-rate", "1"]
    async with serve_process("--allow-uid", f"{US + 1},{US + 2}", *options, folder=tmp_path) as served:
        with trio.fail_after(60):
            for _ in range(100):
                client = raw_client(served.sockets[0])
                await client.no_more()
                client.close()
        assert await served.terminate() == 0
    log = served.log.read_text()
    line = f"rng0: refused a client, pid {os.getpid()} of uid {US}, whose user is not allowed"
    assert line in log
    assert log.count("refused") < 100  # their number is limited, and what is left out is counted


@pytest.mark.parametrize("how", [(), ("--processes",), ("--supervise",)], ids=["one", "processes", "supervise"])
async def test_users_that_are_named_are_served(how: tuple[str, ...], tmp_path: Path) -> None:
    names = ["--allow-uid", f"{US + 1}", "--allow-uid", pwd.getpwuid(US).pw_name]
    async with serve_process(*names, *how, "--device", "rng", folder=tmp_path) as served:
        client = raw_client(served.sockets[0])
        with trio.fail_after(60):
            assert (await client.version()).flags == 1
        client.close()
        assert await served.terminate() == 0


@pytest.mark.skipif(US != 0, reason="only root can connect as another user")
@pytest.mark.parametrize("how", [(), ("--supervise",)], ids=["one", "supervise"])
async def test_who_is_refused_is_not_the_only_client(how: tuple[str, ...], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # unix(7): autobind; a name that every user can connect to
        listening.listen()

        def connect() -> RawClient:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(listening.getsockname())
            return RawClient(sock)

        fd = listening.fileno()
        options = ["--fd", str(fd), "--once", "--allow-uid", str(US), *how, "--device", "rng"]
        async with serve_process(*options, folder=tmp_path, pass_fds=[fd]) as served:
            os.seteuid(US + 1)
            try:
                theirs = connect()
            finally:
                os.seteuid(US)
            with trio.fail_after(60):
                await theirs.no_more()
                ours = connect()
                assert (await ours.version()).flags == 1
            for client in (theirs, ours):
                client.close()
            assert await served.wait() == 0
        assert f"of uid {US + 1}, whose user is not allowed" in served.log.read_text()


@pytest.mark.parametrize("word", ["no-such-user", "", "1,,2", "-1", "1.5", str(2**32 - 1), "9" * 5000])
def test_what_is_no_user(word: str, tmp_path: Path) -> None:
    ended = run_command("serve", f"--allow-uid={word}", "--device", "rng", cwd=tmp_path)
    assert ended.returncode == 2
    assert "argument --allow-uid: " in ended.stderr
    assert "Traceback" not in ended.stderr
