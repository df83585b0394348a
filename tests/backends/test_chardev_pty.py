"""The pty chardev with real pseudo-terminals."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from vfiouser_virtio.backends.chardev import BACKLOG
from vfiouser_virtio.backends.pty import Pty
from vfiouser_virtio.errors import DeviceError


@pytest.fixture
def pty() -> Iterator[Pty]:
    opened = Pty()
    yield opened
    opened.close()


async def wait_connected(pty: Pty, state: bool) -> None:
    with trio.fail_after(60):
        while pty.connected != state:
            await pty.wait_changed()


def open_terminal(pty: Pty) -> int:
    return os.open(pty.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


async def read_exactly(fd: int, count: int) -> bytes:
    data = b""
    with trio.fail_after(60):
        while len(data) < count:
            await trio.lowlevel.wait_readable(fd)
            data += os.read(fd, count - len(data))
    return data


async def test_bytes_pass_unchanged_both_ways_and_connection_is_told(pty: Pty, nursery: trio.Nursery) -> None:
    told: list[bool] = []
    pty.on_connect = told.append
    nursery.start_soon(pty.run)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert not pty.connected
    terminal = open_terminal(pty)
    await wait_connected(pty, True)
    every_byte = bytes(range(256))  # what a line discipline would change: ^C, ^D, CR, LF, ^S
    await pty.send(every_byte)
    assert await read_exactly(terminal, 256) == every_byte
    os.write(terminal, every_byte)
    assert await pty.receive() == every_byte
    os.close(terminal)
    nursery.start_soon(pty.receive)
    await wait_connected(pty, False)
    terminal = open_terminal(pty)
    await wait_connected(pty, True)
    os.close(terminal)
    assert told == [True, False, True]


async def test_output_without_a_reader_waits_for_nobody_and_its_end_is_kept(pty: Pty, nursery: trio.Nursery) -> None:
    nursery.start_soon(pty.run)
    with trio.fail_after(60):
        for number in range(40):
            await pty.send(bytes([number]) * 4096)
    terminal = open_terminal(pty)
    expected = b"".join(bytes([number]) * 4096 for number in range(40))[-BACKLOG:]
    assert await read_exactly(terminal, BACKLOG) == expected
    os.close(terminal)


async def test_input_of_somebody_who_left_at_once_arrives(pty: Pty, nursery: trio.Nursery) -> None:
    nursery.start_soon(pty.run)
    terminal = open_terminal(pty)
    os.write(terminal, b"reboot\n")
    os.close(terminal)
    with trio.fail_after(60):
        assert await pty.receive() == b"reboot\n"


async def test_a_slow_reader_holds_the_sender_up_and_loses_nothing(pty: Pty, nursery: trio.Nursery) -> None:
    nursery.start_soon(pty.run)
    terminal = open_terminal(pty)
    await wait_connected(pty, True)
    data = os.urandom(1 << 20)
    sent = trio.Event()

    async def send() -> None:
        await pty.send(data)
        sent.set()

    nursery.start_soon(send)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not sent.is_set()
    assert await read_exactly(terminal, len(data)) == data
    with trio.fail_after(60):
        await sent.wait()
    os.close(terminal)


async def test_the_sender_goes_on_when_a_stuck_reader_leaves(pty: Pty, nursery: trio.Nursery) -> None:
    nursery.start_soon(pty.run)
    terminal = open_terminal(pty)
    await wait_connected(pty, True)

    async def leave() -> None:
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.close(terminal)

    nursery.start_soon(leave)
    with trio.fail_after(60):
        await pty.send(bytes(1 << 20))
    assert not pty.connected


async def test_run_can_be_cancelled_and_started_again(pty: Pty) -> None:
    terminal = open_terminal(pty)
    for text in (b"before", b"after"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pty.run)
            await wait_connected(pty, True)
            await pty.send(text)
            assert await read_exactly(terminal, len(text)) == text
            nursery.cancel_scope.cancel()
    os.close(terminal)


def test_the_link_comes_and_goes(tmp_path: Path) -> None:
    link = tmp_path / "console"
    link.symlink_to("/dev/pts/999999")  # of a server that was killed
    pty = Pty(link)
    assert os.readlink(link) == pty.path
    assert pty.describe() == f"pty {pty.path} ({link})"
    pty.close()
    pty.close()
    assert not link.is_symlink()


def test_a_link_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(DeviceError, match=r"precious: File exists"):
        Pty(tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "data"
