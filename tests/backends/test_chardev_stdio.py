"""The stdio chardev, in a process of its own: on a terminal, on pipes, on files."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

# Sends back what it gets, in capitals; ends at a "q".
ECHO = """
import trio
from vfiouser_virtio.backends.stdio import Stdio
from vfiouser_virtio.errors import ConfigError

async def main():
    stdio = Stdio()
    try:
        Stdio()
    except ConfigError:
        stdio.send_nowait(b"one only\\n")
    async with trio.open_nursery() as nursery:
        def resized(columns, rows):
            stdio.send_nowait(b"%dx%d\\n" % (columns, rows))
        stdio.on_resize = resized
        nursery.start_soon(stdio.run)
        await trio.testing.wait_all_tasks_blocked()
        await stdio.send(f"size {stdio.size}\\n".encode())
        while True:
            data = await stdio.receive()
            await stdio.send(data.upper())
            if b"q" in data:
                break
        nursery.cancel_scope.cancel()
    stdio.close()

import trio.testing
trio.run(main)
"""


def start(
    stdin: int, stdout: int, *, stderr: int | None = None, preexec_fn: Callable[[], object] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ECHO]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, preexec_fn=preexec_fn)


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(fd, 1)
    return data


def test_a_terminal_is_raw_then_restored_and_its_size_followed() -> None:
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    before = termios.tcgetattr(terminal)

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(terminal, terminal, preexec_fn=take_terminal)
    assert read_until(master, b"\n").endswith(b"one only\r\n")  # output is still cooked
    assert read_until(master, b"\n") == b"size (100, 40)\r\n"
    flags = termios.tcgetattr(terminal)[3]
    assert not flags & (termios.ICANON | termios.ECHO)
    assert flags & termios.ISIG
    os.write(master, b"a")  # no line, and no echo
    assert os.read(master, 10) == b"A"
    assert os.get_blocking(terminal)  # what is shared was not changed
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert read_until(master, b"\n") == b"132x50\r\n"
    os.write(master, b"q")
    assert process.wait(60) == 0
    assert termios.tcgetattr(terminal) == before
    os.close(master)
    os.close(terminal)


def test_the_terminal_is_restored_after_ctrl_c() -> None:
    master, terminal = os.openpty()
    before = termios.tcgetattr(terminal)

    def take_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background of a shell ignore it
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(terminal, terminal, preexec_fn=take_terminal, stderr=subprocess.DEVNULL)
    read_until(master, b")\r\n")
    os.write(master, b"\x03")
    assert process.wait(60) in (1, 130, -signal.SIGINT)
    assert termios.tcgetattr(terminal) == before
    os.close(master)
    os.close(terminal)


def test_pipes() -> None:
    process = start(subprocess.PIPE, subprocess.PIPE)
    output, _ = process.communicate(b"hello q", timeout=60)
    assert output == b"one only\nsize None\nHELLO Q"
    assert process.returncode == 0


def test_files_keep_their_position(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"skipped:typed q")
    with (tmp_path / "in").open("rb", buffering=0) as source, (tmp_path / "out").open("wb", buffering=0) as target:
        source.seek(8)
        target.write(b"kept ")
        assert start(source.fileno(), target.fileno()).wait(60) == 0
    assert (tmp_path / "out").read_bytes() == b"kept one only\nsize None\nTYPED Q"


def test_the_end_of_input_is_no_end_of_output() -> None:
    process = start(subprocess.DEVNULL, subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"one only\n"
    assert process.stdout.readline() == b"size None\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
