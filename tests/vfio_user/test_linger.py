"""Waiting outside of trio: only for fast clients, and never in the way of other tasks' input."""

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from vfiouser_virtio.trio_epoll import epoll_watching
from vfiouser_virtio.vfio_user.wire import sockets
from vfiouser_virtio.vfio_user.wire.sockets import Linger


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that no machine is too slow for it."""
    monkeypatch.setattr(sockets, "LINGER_MS", 10_000)


async def fast_client(ours: socket.socket, theirs: socket.socket) -> Linger:
    """What waits for a client that has been fast."""
    waits = Linger(ours)
    theirs.send(b"x")
    await waits.wait_readable()
    ours.recv(1)
    return waits


@pytest.mark.usefixtures("patient")
async def test_it_waits_for_a_fast_client(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    waits = await fast_client(ours, theirs)
    later = threading.Timer(0.05, theirs.send, [b"y"])
    later.start()
    assert not waits.is_readable()
    assert waits.wait_nearby()
    assert ours.recv(1) == b"y"
    later.join()


async def test_nobody_waits_nearby_for_a_client_that_has_not_been_fast(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    waits = Linger(ours)
    theirs.send(b"x")
    assert waits.is_readable()
    assert not waits.wait_nearby()  # although there is something: nothing is known of it yet
    monkeypatch.setattr(sockets, "LINGER_MS", 0)
    await waits.wait_readable()
    assert not waits.wait_nearby()


async def test_silence_ends_it(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    monkeypatch.setattr(sockets, "LINGER_MS", 10_000)
    waits = await fast_client(ours, theirs)
    monkeypatch.setattr(sockets, "LINGER_MS", 1)
    assert not waits.wait_nearby()
    theirs.send(b"y")
    assert not waits.wait_nearby()  # it was not fast enough


@pytest.mark.usefixtures("patient")
async def test_input_for_another_task_ends_it(nursery: trio.Nursery, pair: tuple[socket.socket, socket.socket]) -> None:
    waits = await fast_client(*pair)
    reader, writer = os.pipe()
    woken = trio.Event()

    async def other() -> None:
        await trio.lowlevel.wait_readable(reader)
        woken.set()

    nursery.start_soon(other)
    await trio.testing.wait_all_tasks_blocked()
    os.write(writer, b"x")
    assert not waits.wait_nearby()
    with trio.fail_after(60):
        await woken.wait()
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("patient")
async def test_a_thread_that_calls_into_trio_ends_it(pair: tuple[socket.socket, socket.socket]) -> None:
    waits = await fast_client(*pair)
    called = trio.Event()
    token = trio.lowlevel.current_trio_token()
    thread = threading.Timer(0.05, token.run_sync_soon, [called.set])
    thread.start()
    assert not waits.wait_nearby()
    with trio.fail_after(60):
        await called.wait()
    thread.join()


@pytest.mark.usefixtures("patient")
async def test_where_the_epoll_instance_is_not_to_be_found_there_is_only_trio(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(sockets, "trio_epoll", lambda _fd: None)
    waits = await fast_client(ours, theirs)
    theirs.send(b"y")
    assert not waits.wait_nearby()


def test_the_epoll_instance_that_watches_a_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with select.epoll() as one, select.epoll() as other:
        one.register(ours)
        other.register(theirs)
        assert epoll_watching(ours.fileno()) == one.fileno()
        assert epoll_watching(theirs.fileno()) == other.fileno()
        one.unregister(ours)
        assert epoll_watching(ours.fileno()) is None
