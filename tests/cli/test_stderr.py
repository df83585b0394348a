"""stderr of a server: whatever its peers do and its reader does not, the devices go on and it ends when told to."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from support.command import COMMAND, run_command, serve_process
from support.descriptors import descriptors_of
from support.small_client import cause_warnings, client_of, read_status, status_write

from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags

How = tuple[str, ...]


@pytest.fixture(params=[(), ("--processes",)], ids=["one-process", "processes"])
def how(request: pytest.FixtureRequest) -> How:
    options: How = request.param
    return options


def test_a_line_begins_on_its_own_on_a_terminal() -> None:
    """What a guest prints comes in pieces, and at once; what it goes on with comes after the line of ours."""
    script = """
import sys, trio
from vfiouser_virtio.serving.terminal import flush_stderr, set_up_streams, write_patiently
set_up_streams()
async def main():
    for text in ("prompt: ", "answer", "\\n", "whole\\n"):
        await write_patiently(1, text.encode())
        print("log", file=sys.stderr)
        flush_stderr()
trio.run(main)
"""
    ours, theirs = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", script], stdout=theirs, stderr=theirs, check=True)
        shown = os.read(ours, 4096).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown == ["prompt: ", "log", "answer", "log", "", "log", "whole", "log"]


async def turned_away(path: str) -> None:
    with client_of(path) as client, pytest.raises((EOFError, ConnectionError)):
        await client.receive()


async def test_a_pipe_that_nobody_reads(how: How, tmp_path: Path) -> None:
    """One process: the other device of it goes on as well."""
    reading, writing = os.pipe()
    try:
        arguments = [*how, "--device", "rng", "--device", "rng", "--log-rate", "0"]
        async with serve_process(*arguments, folder=tmp_path, stderr=writing) as served:
            with client_of(served.sockets[0]) as hostile, client_of(served.sockets[1]) as innocent:
                await hostile.version()
                await innocent.version()
                await cause_warnings(hostile, 3000)  # some 100 bytes each: more than the 64 KiB of a pipe
                assert await read_status(innocent) == 0
                assert await served.terminate() == 0
    finally:
        os.close(writing)
        os.close(reading)


@pytest.mark.parametrize("hostile", ["resets", "connections"])
@pytest.mark.diagonal("hostile", "how")
async def test_a_flood_is_counted_instead(hostile: str, how: How, tmp_path: Path) -> None:
    arguments = [*how, "--device", "rng", "--log-rate", "1"]
    async with serve_process(*arguments, folder=tmp_path) as served:
        with client_of(served.sockets[0]) as client:
            await client.version()
            if hostile == "resets":
                words = "features 0x0 refused"
                await cause_warnings(client, 2000)
            else:
                words = "refused another client"
                for _ in range(2000):
                    await turned_away(served.sockets[0])
        assert await served.terminate() == 0
    log = served.log.read_text()
    lines = log.splitlines()
    written = [line for line in lines if words in line]
    dropped = [int(number) for number in re.findall(r"WARNING rng0: (\d+) more lines were dropped", log)]
    others = [line for line in lines if line not in written and "more lines" not in line]
    assert len(written) < 1000
    # Every line that there would have been is there or counted: these, that a client came, and perhaps that it went.
    assert len(written) + len(others) + sum(dropped) - 2000 in (1, 2), log
    assert all(" rng0: " in line for line in lines)


async def test_text_of_a_client_is_text(how: How, tmp_path: Path) -> None:
    async with serve_process(*how, "--device", "rng", folder=tmp_path) as served:
        with client_of(served.sockets[0]) as client:
            document = '{"capabilities": {"max_msg_fds": "\\u001b]0;owned\\u0007\\n12:00:00 ERROR forged"}}'
            await client.send(client.request(Command.VERSION, struct.pack("<HH", 0, 0) + document.encode() + b"\0"))
            assert (await client.receive()).error != 0
        assert await served.terminate() == 0
    log = served.log.read_text()
    assert r"VERSION: max_msg_fds is '\x1b]0;owned\x07\n12:00:00 ERROR forged'" in log
    assert "\x1b" not in log
    assert [line for line in log.splitlines() if line.startswith("12:00:00 ERROR")] == []


BROKEN = """\
from vfiouser_virtio.virtio import Device, queue

class Broken(Device):
    device_id = 42
    requestq = queue()
    async def run(self) -> None:
        raise ValueError("\\x1b[2J\\n12:00:00 ERROR forged")
"""


async def test_a_traceback_is_indented_text(how: How, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    async with serve_process(*how, "--device", "mine.py:Broken", folder=tmp_path) as served:
        with client_of(served.sockets[0]) as client:
            await client.version()
            for index, value in enumerate((0x03, 0x0B, 0x0F)):
                if index == 1:
                    select = struct.pack("<QIII", 0x8, 4, 4, 1)
                    await client.send(client.request(Command.REGION_WRITE, select, MessageFlags.NO_REPLY))
                    version_1 = struct.pack("<QIII", 0xC, 4, 4, 1)
                    await client.send(client.request(Command.REGION_WRITE, version_1, MessageFlags.NO_REPLY))
                await client.send(status_write(client, value))
            with trio.fail_after(60):
                while not await read_status(client) & 0x40:
                    await trio.sleep(0.01)
        assert await served.terminate() == 0
    log = served.log.read_text()
    assert "    ValueError: \\x1b[2J\n" in log
    assert "    12:00:00 ERROR forged\n" in log
    assert "\x1b" not in log


def closing(number: int) -> list[str]:
    """The command with one of its standard streams closed."""
    return ["sh", "-c", f'exec "$@" {number}>&-', "sh", *COMMAND]


async def test_stderr_may_be_closed(how: How, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    arguments = [*how, "--device", "blk,path=disk.img", "--device", "rng"]
    async with serve_process(*arguments, folder=tmp_path, command=closing(2)) as served:
        assert descriptors_of(served.process.pid)[2] == "/dev/null"  # and not a disk that a C library would write into
        with client_of(served.sockets[1]) as client:
            await client.version()
            await cause_warnings(client, 100)
        assert await served.terminate() == 0


async def test_a_mistake_with_stderr_closed_has_its_status(tmp_path: Path) -> None:
    ended = await trio.run_process([*closing(2), "serve", "--device", "nosuch"], check=False, capture_stdout=True)
    assert (ended.returncode, ended.stdout) == (2, b"")


def test_log_rate_is_a_number() -> None:
    ended = run_command("serve", "--device", "rng", "--log-rate", "many")
    assert ended.returncode == 2
    assert "--log-rate: 'many' is no number of lines a second" in ended.stderr
