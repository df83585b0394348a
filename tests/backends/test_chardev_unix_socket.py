"""The unix chardev with real sockets."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.net_sink import Sink

from vfiouser_virtio.backends.chardev import BACKLOG
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.unix_socket import UnixSocket
from vfiouser_virtio.errors import ConfigError, DeviceError


@pytest.fixture
def chardev(tmp_path: Path) -> Iterator[UnixSocket]:
    opened = UnixSocket(tmp_path / "x.sock")
    yield opened
    opened.close()


async def connect(tmp_path: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(tmp_path / "x.sock")


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(60):
        while len(data) < count:
            piece = await stream.receive_some(count - len(data))
            assert piece, f"end after {len(data)} of {count} bytes"
            data += piece
    return data


async def test_clients_come_one_after_another(chardev: UnixSocket, tmp_path: Path, nursery: trio.Nursery) -> None:
    told: list[bool] = []
    chardev.on_connect = told.append
    nursery.start_soon(chardev.run)
    first = await connect(tmp_path)
    second = await connect(tmp_path)
    await first.send_all(b"one")
    await second.send_all(b"two")
    with trio.fail_after(60):
        assert await chardev.receive() == b"one"
        await chardev.send(b"ONE")
        assert await first.receive_some() == b"ONE"
        await first.aclose()
        assert await chardev.receive() == b"two"
        await chardev.send(b"TWO")
        assert await second.receive_some() == b"TWO"
        await second.aclose()
        nursery.start_soon(chardev.receive)
        while chardev.connected:
            await chardev.wait_changed()
    assert told == [True, False, True, False]


@pytest.mark.parametrize("kind", ["chardev", "stream"])
async def test_a_client_that_comes_while_no_file_can_be_opened_is_taken_later(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """accept(2) with EMFILE was the device's end."""
    path, accept, errors = tmp_path / "l.sock", socket.socket.accept, [errno.EMFILE, errno.EMFILE, errno.ECONNABORTED]

    def short(self: socket.socket) -> tuple[socket.socket, Any]:
        if errors:
            raise OSError(error := errors.pop(0), os.strerror(error))
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", short)
    listening = UnixSocket(path) if kind == "chardev" else StreamNetdev(addr__path=path, server=True)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        async with trio.open_nursery() as nursery:
            if isinstance(listening, UnixSocket):
                nursery.start_soon(listening.run)
                client.send(b"hello")
                assert await listening.receive() == b"hello"
            else:
                nursery.start_soon(listening.run, sink := Sink())
                client.send(b"\0\0\0\x05hello")
                assert await sink.wait_frames(1) == [b"hello"]
            nursery.cancel_scope.cancel()
    assert not errors
    assert [record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()] == [
        f"{listening.log.device}: {listening.describe()}: cannot accept a peer: {os.strerror(errno.EMFILE)}"
    ]
    listening.close()


async def test_output_without_a_client_is_kept_up_to_a_limit(
    chardev: UnixSocket, tmp_path: Path, nursery: trio.Nursery
) -> None:
    nursery.start_soon(chardev.run)
    data = os.urandom(3 * BACKLOG + 5)
    with trio.fail_after(60):
        await chardev.send(data)
    stream = await connect(tmp_path)
    assert await read_exactly(stream, BACKLOG) == data[-BACKLOG:]
    await chardev.send(b"and on")
    assert await read_exactly(stream, 6) == b"and on"
    await stream.aclose()


async def test_a_slow_client_holds_the_sender_up_and_loses_nothing(
    chardev: UnixSocket, tmp_path: Path, nursery: trio.Nursery
) -> None:
    nursery.start_soon(chardev.run)
    stream = await connect(tmp_path)
    await stream.send_all(b"x")
    await chardev.receive()
    data = os.urandom(4 << 20)
    sent = trio.Event()

    async def send() -> None:
        await chardev.send(data)
        sent.set()

    nursery.start_soon(send)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not sent.is_set()
    assert await read_exactly(stream, len(data)) == data
    with trio.fail_after(60):
        await sent.wait()
    await stream.aclose()


async def test_the_sender_goes_on_when_a_stuck_client_leaves(
    chardev: UnixSocket, tmp_path: Path, nursery: trio.Nursery
) -> None:
    nursery.start_soon(chardev.run)
    stream = await connect(tmp_path)
    await stream.send_all(b"x")
    await chardev.receive()

    async def leave() -> None:
        await trio.testing.wait_all_tasks_blocked(0.05)
        await stream.aclose()

    nursery.start_soon(leave)
    with trio.fail_after(60):
        await chardev.send(bytes(4 << 20))
    assert not chardev.connected


async def test_a_cancelled_send_is_finished_by_the_next_run(chardev: UnixSocket, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chardev.run)
        stream = await connect(tmp_path)
        await stream.send_all(b"x")
        await chardev.receive()
        nursery.start_soon(chardev.send, data)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chardev.run)
        assert await read_exactly(stream, len(data)) == data
        nursery.cancel_scope.cancel()
    await stream.aclose()


async def test_sends_that_are_cancelled_again_and_again_do_not_pile_up(chardev: UnixSocket, tmp_path: Path) -> None:
    """As by a guest that resets its device each time, before a client that does not read."""
    piece, cancelled = 64 << 10, 40
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chardev.run)
        stream = await connect(tmp_path)
        await stream.send_all(b"x")
        await chardev.receive()
        nursery.cancel_scope.cancel()
    for number in range(cancelled):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chardev.run)
            nursery.start_soon(chardev.send, bytes([number]) * piece)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chardev.run)
        nursery.start_soon(chardev.send, b"and on")
        data = b""
        with trio.fail_after(60):
            while not data.endswith(b"and on"):
                data += await stream.receive_some(1 << 20)
        nursery.cancel_scope.cancel()
    await stream.aclose()
    sent = data.removesuffix(b"and on")
    assert len(sent) % piece == 0  # all of what was begun, in order
    assert sent == b"".join(bytes([number]) * piece for number in range(len(sent) // piece))
    assert len(sent) < cancelled * piece // 2


def test_the_socket_is_ours_alone_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    before = os.umask(0)
    try:
        chardev = UnixSocket(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert chardev.describe() == f"unix:{path}"
    chardev.close()
    chardev.close()
    assert not path.exists()


def test_a_dead_socket_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    chardev = UnixSocket(path)
    with pytest.raises(DeviceError, match="another program listens there"):
        UnixSocket(path)
    path.unlink()
    path.write_text("somebody else's")
    chardev.close()
    assert path.read_text() == "somebody else's"


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="file: something that is not a socket has that name"):
        UnixSocket(tmp_path / "file")
    with pytest.raises(DeviceError, match="No such file or directory"):
        UnixSocket(tmp_path / "no" / "x.sock")
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        UnixSocket(Path("/tmp") / ("x" * 103))
