"""Sending and receiving with fds on a real socket pair, where the kernel cuts, refuses and drops things."""

import contextlib
import os
import resource
import socket
import struct
from array import array
from collections.abc import Iterator

import pytest
import trio
from support.waiting import never_waits

from vfiouser_virtio.vfio_user.wire.connection import request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket, peer_pid


@pytest.fixture
def pair() -> Iterator[tuple[MessageSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    messages = MessageSocket(ours)
    yield messages, theirs
    messages.close()
    theirs.close()


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])


def test_nothing_to_read_and_the_end(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    with pytest.raises(BlockingIOError):
        messages.receive_nowait()
    assert not messages.peer_hung_up()
    theirs.send(request(1, 13))
    assert messages.receive_nowait()
    theirs.send(b"rest")
    theirs.close()
    assert messages.peer_hung_up()  # although there is something left to read
    assert messages.receive_nowait()
    assert not messages.receive_nowait()
    assert messages.close()  # in the middle of a message


def test_a_reset_is_an_end(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    messages.send(request(1, 13))
    theirs.close()  # without having read it
    assert not messages.receive_nowait()


def test_received_fds_are_not_inherited(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    send_fds(theirs, request(1, 2), [0, 1])
    assert messages.receive_nowait()
    assert messages.connection.next()
    fds = messages.connection.message().take_fds()
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in (0, 1)]
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_as_many_fds_as_there_can_be(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    send_fds(theirs, request(1, 2), [0] * 253)
    assert messages.receive_nowait()
    assert messages.connection.next()
    message = messages.connection.message()
    assert len(message.fds) == 253
    assert not message.fds_lost
    for fd in message.take_fds():
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_fds_for_which_there_is_no_room_are_known_to_be_lost(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    send_fds(theirs, request(1, 2), [0] * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3, hard))
    try:
        assert messages.receive_nowait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert messages.connection.next()
    message = messages.connection.message()
    assert message.fds_lost
    assert len(message.fds) < 8
    for fd in message.take_fds():
        os.close(fd)


async def test_what_the_socket_does_not_take_is_queued_in_order(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    sent = b""
    queued = False
    for number in range(100):
        message = request(number, 9, os.urandom(20_000))
        sent += message
        queued = messages.send(message, [0] if number == 99 else ())
    assert queued
    assert messages.queued > 1_000_000
    received = b""
    fds: list[int] = []

    async def read() -> None:
        nonlocal received
        while len(received) < len(sent):
            await trio.lowlevel.wait_readable(theirs)
            data, ancillary, _flags, _ = theirs.recvmsg(1 << 20, socket.CMSG_SPACE(64))
            received += data
            fds.extend(fd for _level, _kind, raw in ancillary for fd in struct.unpack("i", raw))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await messages.flush()
    assert received == sent
    assert messages.queued == 0
    assert len(fds) == 1
    os.close(fds[0])
    assert not messages.send(request(1, 13))


async def test_a_peer_that_is_gone(pair: tuple[MessageSocket, socket.socket]) -> None:
    messages, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    while not messages.send(request(1, 9, bytes(20_000)), [0]):
        pass
    theirs.close()
    with trio.fail_after(60):
        await messages.flush()
    assert messages.broken
    assert not messages.send(request(1, 13))
    messages.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_peer_pid(pair: tuple[MessageSocket, socket.socket]) -> None:
    assert peer_pid(pair[1]) == os.getpid()


async def test_whoever_shares_the_socket_may_clear_o_nonblock() -> None:
    """With --fd it is one open file with the process that gave it: its flags are anybody's."""
    ours, theirs = socket.socketpair()
    shared = ours.dup()
    messages = MessageSocket(ours)

    def cleared() -> None:
        shared.setblocking(True)
        assert os.get_blocking(messages.socket.fileno())

    with never_waits():
        cleared()
        with pytest.raises(BlockingIOError):
            messages.receive_nowait()
        while not messages.send(bytes(1 << 16)):
            cleared()
        queued = messages.queued
        cleared()
        assert messages.send(b"more", [0])
        with trio.move_on_after(0.01) as scope:
            await messages.flush()
        assert scope.cancelled_caught
        assert messages.queued > queued + (60 << 10)  # a file descriptor counts as much as many bytes
        # With descriptors there is a call of its own, in both places.
        more = messages.queued - queued
        while messages.queued > more:
            theirs.recv(1 << 20)
            with trio.move_on_after(0.01):
                await messages.flush()
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.recv(1 << 20)
        while not messages.send(bytes(1 << 16), [0]):
            cleared()
        with trio.move_on_after(0.01):
            await messages.flush()
        assert messages.queued
    messages.close()
    shared.close()
    theirs.close()
