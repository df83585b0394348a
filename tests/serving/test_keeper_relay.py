"""A keeper's relay while no process of the device takes what the client sends."""

import errno
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    IOEVENTFD,
    IRQ_SET,
    REGION_ACCESS,
    REGION_IO_FDS,
    Command,
    IrqSetFlags,
    MessageFlags,
)
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.mappings import MAPPING, MAPPINGS, MOST_FILES
from vfiouser_virtio.serving.keeper.pending import MOST_SENT
from vfiouser_virtio.serving.keeper.relay import MOST_ASKING, MOST_WAITING, Relay
from vfiouser_virtio.vfio_user.wire.connection import Message, reply, request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

_MAP, _IRQS, _IO_FDS, _IO_FD = codec(DMA_MAP), codec(IRQ_SET), codec(REGION_IO_FDS), codec(IOEVENTFD)


@contextmanager
def relayed(*, notify_by_eventfd: bool = True) -> Iterator[tuple[Relay, socket.socket]]:
    """A relay, and its client's end."""
    ours, client = socket.socketpair()
    relay = Relay(ours, DeviceLog(logging.getLogger(__name__), "mine"), notify_by_eventfd=notify_by_eventfd)
    with client:
        client.setblocking(False)
        try:
            yield relay, client
        finally:
            relay.close()


@contextmanager
def a_file() -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        yield fd
    finally:
        os.close(fd)


def take(process: MessageSocket) -> list[Message]:
    """All that the process was sent, until nothing more comes."""
    taken: list[Message] = []
    with suppress(BlockingIOError):
        while process.receive_nowait():
            while process.connection.next():
                message = process.connection.message()
                close_all(message.take_fds())
                taken.append(message)
    return taken


@pytest.mark.parametrize("size", [0, 4000])
def test_a_client_that_floods_a_dead_device_waits(size: int) -> None:
    """What is taken is bounded by its cost, so small messages count, too; the next process gets all of it, in order."""
    with relayed() as (relay, client):
        one = request(7, Command.DEVICE_GET_INFO, bytes(size))
        messages = one * 64
        sent = 0
        while relay.takes_more:
            try:
                sent += client.send(messages[sent % len(one) :])
            except BlockingIOError:
                assert relay.from_client()
            assert sent < 2 * MOST_WAITING, "it takes without an end"
        mine, device = socket.socketpair()
        relay.attach(mine, -1)
        with device:
            assert relay.was_told()
            relay.go_on()
            process, taken = MessageSocket(device), 0
            while batch := take(process):
                for message in batch:
                    assert len(message.body) == size
                    process.send(reply(message.id, message.command))
                relay.from_device()
                relay.send_requests()
                with suppress(BlockingIOError):
                    client.recv(1 << 16)
                taken += len(batch)
            assert taken > MOST_WAITING // 2 // (len(one) + 256)


def told_to(relay: Relay) -> tuple[list[tuple[int, int]], int]:
    """Command and number of file descriptors of all that a new process is told, and how many were on their way."""
    mine, device = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    relay.attach(mine, -1)
    process = MessageSocket(device)
    told: list[tuple[int, int]] = []
    most = 0
    while True:
        taken: list[tuple[int, int]] = []
        with suppress(BlockingIOError):
            while process.receive_nowait():
                while process.connection.next():
                    message = process.connection.message()
                    taken.append((message.command, len(message.fds)))
                    close_all(message.take_fds())
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        if not taken:
            break
        told += taken
        assert not relay.was_told()
        for command, _ in taken:
            if command != Command.DEVICE_GET_REGION_IO_FDS:
                process.send(reply(0, command))
                assert relay.from_device()
    process.close()
    return told, most


def test_a_process_is_told_of_all_mappings_of_a_file_in_a_few_messages() -> None:
    """Not by one DMA_MAP and one file descriptor each: a driver behind a vIOMMU has thousands."""
    with relayed() as (relay, _client), a_file() as fd:
        relay.told.note(Command.VERSION, b"\0\0\1\0{}\0", [])
        for number in range(8000):
            payload = _MAP.pack(_MAP.size, 3, 0, number * 0x2000, 0x1000)
            relay.told.note(Command.DMA_MAP, payload, [os.dup(fd)])
        told, most = told_to(relay)
        assert told == [
            (Command.VERSION, 0),
            *[(MAPPINGS, 1)] * 8,
            (Command.DEVICE_GET_REGION_IO_FDS, 0),
        ]
        assert most <= 2


def test_a_process_is_told_of_mappings_of_many_files_a_few_at_a_time() -> None:
    """All at once they would be more file descriptors on their way than a process may have."""
    with relayed() as (relay, _client):
        relay.told.note(Command.VERSION, b"\0\0\1\0{}\0", [])
        for number in range(300):
            payload = _MAP.pack(_MAP.size, 3, 0, number * 0x2000, 0x1000)
            relay.told.note(Command.DMA_MAP, payload, [os.memfd_create("test")])
        told, most = told_to(relay)
        assert [files for command, files in told if command == MAPPINGS] == [*[MOST_FILES] * 4, 300 - 4 * MOST_FILES]
        assert most <= 1 + MOST_SENT + MOST_FILES


def test_a_process_is_told_of_neighbouring_vectors_in_one_message() -> None:
    with relayed() as (relay, _client):
        relay.told.note(Command.VERSION, b"\0\0\1\0{}\0", [])

        def vectors(action: IrqSetFlags, index: int, start: int, count: int) -> None:
            payload = _IRQS.pack(_IRQS.size, IrqSetFlags.DATA_EVENTFD | action, index, start, count)
            relay.told.note(Command.DEVICE_SET_IRQS, payload, [os.eventfd(0) for _ in range(count)])

        vectors(IrqSetFlags.ACTION_TRIGGER, 2, 10, 7)
        vectors(IrqSetFlags.ACTION_TRIGGER, 2, 0, 10)
        vectors(IrqSetFlags.ACTION_TRIGGER, 2, 30, 1)
        vectors(IrqSetFlags.ACTION_TRIGGER, 0, 0, 1)
        vectors(IrqSetFlags.ACTION_UNMASK, 0, 0, 1)
        seen = []
        for command, payload, fds in relay.told.told():
            if command == Command.DEVICE_SET_IRQS:
                _size, flags, index, start, count = _IRQS.unpack(payload)
                assert len(fds) == count
                seen.append((flags & ~IrqSetFlags.DATA_EVENTFD, index, start, count))
        trigger, unmask = int(IrqSetFlags.ACTION_TRIGGER), int(IrqSetFlags.ACTION_UNMASK)
        assert seen == [
            (unmask, 0, 0, 1),
            (trigger, 0, 0, 1),
            (trigger, 2, 0, 16),
            (trigger, 2, 16, 1),
            (trigger, 2, 30, 1),
        ]


def test_the_keepers_own_command_is_unknown_to_clients() -> None:
    """A client could make mappings by it that no later process is told of."""
    with a_file() as fd, live() as (relay, client, process):
        client.socket.send(request(1, Command.DEVICE_RESET))
        relay.from_client()
        socket.send_fds(client.socket, [request(2, MAPPINGS, bytes(MAPPING.sizeof()))], [fd])
        relay.from_client()
        client.socket.send(request(3, MAPPINGS, flags=int(MessageFlags.NO_REPLY)))
        relay.from_client()
        assert [message.id for message in take(process)] == [1]
        process.send(reply(1, Command.DEVICE_RESET))
        assert relay.from_device()
        assert [(message.id, message.error) for message in take(client)] == [(1, 0), (2, errno.ENOSYS)]
        assert take(process) == []


def test_a_message_that_cannot_be_sent_is_noticed() -> None:
    """There is no room for a copy of its file descriptors: the device would never hear of it, and the client wait."""
    mine, device = socket.socketpair()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with relayed() as (relay, client), device, a_file() as fd:
        relay.attach(mine, -1)
        assert relay.was_told()
        with suppress(BlockingIOError):
            while True:
                mine.send(bytes(1 << 16))  # it is busy, and takes nothing
        socket.send_fds(client, [request(1, Command.DMA_MAP)], [fd])
        assert relay.from_client()
        free = os.dup(fd)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            relay.go_on()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert relay.device_failure == "Too many open files"


@contextmanager
def live(*, notify_by_eventfd: bool = True) -> Iterator[tuple[Relay, MessageSocket, MessageSocket]]:
    """A relay, its client, and a device's process that goes on where nothing was."""
    mine, device = socket.socketpair()
    with relayed(notify_by_eventfd=notify_by_eventfd) as (relay, client):
        relay.attach(mine, -1)
        assert relay.was_told()
        relay.go_on()
        process = MessageSocket(device)
        try:
            yield relay, MessageSocket(client), process
        finally:
            process.close()


def test_answers_that_the_client_does_not_read_stay_with_the_device() -> None:
    """As many as the client wants to ask for, if the keeper took them."""
    with live() as (relay, client, process):
        answered, data = 0, bytes(60_000)
        while relay.takes_answers:
            client.send(request(answered, Command.REGION_READ))
            assert relay.from_client()
            for message in take(process):
                process.send(reply(message.id, message.command, data))
                answered += 1
            while not process.flush_nowait() and relay.takes_answers:
                relay.from_device()
            assert answered * len(data) < 2 * MOST_WAITING, "it takes without an end"
        read = 0
        while read < answered:
            process.flush_nowait()
            if relay.takes_answers:
                relay.from_device()
            relay.client.flush_nowait()
            for message in take(client):
                assert (message.id, len(message.body)) == (read, len(data))
                read += 1


def test_answers_that_the_device_does_not_read_stay_with_the_client() -> None:
    with live() as (relay, client, process):
        data = bytes(1 << 20)
        for number in range(100):
            process.send(request(number, Command.DMA_READ))
            relay.from_device()
            client.send(reply(number, Command.DMA_READ, data))
            while not client.flush_nowait() and relay.takes_more:
                assert relay.from_client()
        assert not relay.takes_more
        assert relay.device is not None
        assert relay.device.queued < MOST_WAITING + (2 << 20)


def test_a_device_that_asks_without_waiting() -> None:
    with live() as (relay, client, process):
        for number in range(MOST_ASKING):
            process.send(request(number, Command.DMA_READ))
            relay.from_device()
            take(client)
        process.send(request(0, Command.DMA_READ))
        with pytest.raises(RelayError, match="more than 0x2000 requests"):
            relay.from_device()


def test_a_client_that_never_answers() -> None:
    """However often its device dies."""
    with live() as (relay, client, process):
        while not relay.client_failure:
            for number in range(MOST_ASKING // 2):
                process.send(request(number, Command.DMA_READ))
                relay.from_device()
                take(client)
            process.close()
            relay.detach()
            mine, device = socket.socketpair()
            process = MessageSocket(device)
            relay.attach(mine, -1)
            assert relay.was_told()
            relay.go_on()
        process.close()
        assert relay.client_failure == f"it has not answered {MOST_ASKING * 3 // 2:#x} requests"


def test_a_mapping_that_was_not_answered_comes_before_the_device_goes_on() -> None:
    """What the device has in flight may lie in it; what is behind it may be what has killed the last process."""
    mine, device = socket.socketpair()
    with relayed() as (relay, client):
        relay.told.note(Command.VERSION, b"\0\0\1\0{}\0", [])
        mapping = _MAP.pack(_MAP.size, 3, 0, 0x1000, 0x1000)
        client.send(request(1, Command.DMA_MAP, mapping) + request(2, Command.DEVICE_GET_INFO))
        assert relay.from_client()
        relay.attach(mine, -1)
        process = MessageSocket(device)
        answers: dict[int, bytes] = {Command.DEVICE_GET_REGION_IO_FDS: _IO_FDS.pack(_IO_FDS.size, 0, 4, 0)}
        asked: list[int] = []
        while not relay.was_told():
            for message in take(process):
                asked.append(message.command)
                process.send(reply(message.id, message.command, answers.get(message.command, b"")))
            assert relay.from_device()
        assert asked == [Command.VERSION, Command.DEVICE_GET_REGION_IO_FDS, Command.DMA_MAP]
        assert [message.id for message in take(MessageSocket(client))] == [1]
        assert not take(process)
        relay.go_on()
        assert [message.command for message in take(process)] == [Command.DEVICE_GET_INFO]
        process.close()


def test_eventfds_of_queues_outlive_a_death_where_notifications_are_messages() -> None:
    """With --trace: a client that has asked for them uses them all the same."""
    with live(notify_by_eventfd=False) as (relay, client, process):
        client.send(request(1, Command.VERSION, b"\0\0\1\0{}\0"))
        assert relay.from_client()
        process.send(reply(1, Command.VERSION, b"\0\0\1\0{}\0"))
        assert relay.from_device()
        queue = os.eventfd(0)
        found = _IO_FDS.pack(_IO_FDS.size, 0, 4, 1) + _IO_FD.pack(0x3000, 2, 0, 0, 0, 0)
        process.send(reply(0, Command.DEVICE_GET_REGION_IO_FDS, found), [queue])
        assert relay.from_device()
        os.close(queue)
        assert len(relay.notifications) == 1
        access = codec(REGION_ACCESS).pack(0x3000, 4, 2)
        take(process)
        client.send(request(2, Command.REGION_WRITE, access + b"\0\0", flags=int(MessageFlags.NO_REPLY)))
        assert relay.from_client()
        assert [message.command for message in take(process)] == [Command.REGION_WRITE]


def test_a_notification_that_cannot_be_signalled_stays_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """No asynchronous I/O and no thread on the host: that is no end of the keeper."""

    def signal(_fd: int) -> None:
        raise RuntimeError("can't start new thread")

    with live() as (relay, client, process):
        client.send(request(1, Command.VERSION, b"\0\0\1\0{}\0"))
        assert relay.from_client()
        queue = os.eventfd(0, os.EFD_NONBLOCK)
        found = _IO_FDS.pack(_IO_FDS.size, 0, 4, 1) + _IO_FD.pack(0x3000, 2, 0, 0, 0, 0)
        process.send(reply(1, Command.VERSION, b"\0\0\1\0{}\0"))
        process.send(reply(0, Command.DEVICE_GET_REGION_IO_FDS, found), [queue])
        while len(relay.notifications) == 0:
            assert relay.from_device()
        take(process)
        notification = codec(REGION_ACCESS).pack(0x3000, 4, 2) + b"\0\0"
        for fails in False, True:
            if fails:
                monkeypatch.setattr("vfiouser_virtio.serving.keeper.notifications.signal", signal)
            client.send(request(2, Command.REGION_WRITE, notification, flags=int(MessageFlags.NO_REPLY)))
            assert relay.from_client()
            assert [message.command for message in take(process)] == [Command.REGION_WRITE] * fails
        assert os.eventfd_read(queue) == 1
        os.close(queue)


def test_a_forked_process_is_to_close_all_files_of_the_client() -> None:
    """Also those of a message that is not all there, and of one that waits for room in the socket."""

    def open_fds() -> set[int]:
        names = os.listdir("/proc/self/fd")
        return {int(name) for name in names if os.path.exists(f"/proc/self/fd/{name}")}  # not that of listdir()

    with a_file() as fd, live() as (relay, client, _device):
        before = open_fds()
        mapping = request(1, Command.DMA_MAP, _MAP.pack(_MAP.size, 3, 0, 0, 0x1000))
        socket.send_fds(client.socket, [mapping[:20]], [fd])
        relay.from_client()
        assert relay.device is not None
        while not relay.device.send(mapping, [fd]):
            pass
        taken = open_fds() - before
        assert len(taken) >= 2
        assert taken < {*relay.fds()}


def test_a_request_without_room_for_its_file_is_refused_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server answers in order: also with requests before it that have no answer yet, and over a death."""

    def mapping(number: int) -> bytes:
        return request(number, Command.DMA_MAP, _MAP.pack(_MAP.size, 3, 0, number << 12, 0x1000))

    with a_file() as fd, live() as (relay, client, process):
        client.socket.send(mapping(1))
        relay.from_client()
        monkeypatch.setattr("vfiouser_virtio.serving.keeper.relay.room_for", lambda fds: not fds)
        socket.send_fds(client.socket, [mapping(2)], [fd])
        relay.from_client()
        client.socket.send(mapping(3) + request(4, Command.DEVICE_GET_INFO))
        relay.from_client()
        assert [message.id for message in take(process)] == [1]
        assert take(client) == []
        relay.detach()
        assert take(client) == []
        mine, device = socket.socketpair()
        relay.attach(mine, -1)
        assert relay.was_told()
        relay.go_on()
        other = MessageSocket(device)
        try:
            assert [message.id for message in take(other)] == [1]
            other.send(reply(1, Command.DMA_MAP))
            assert relay.from_device()
            answers = take(client)
            assert [(message.id, message.error) for message in answers] == [(1, 0), (2, errno.EMFILE)]
            assert [message.id for message in take(other)] == [3, 4]
            socket.send_fds(client.socket, [mapping(5)], [fd])
            relay.from_client()
            other.send(reply(3, Command.DMA_MAP) + reply(4, Command.DEVICE_GET_INFO))
            assert relay.from_device()
            assert [message.id for message in take(client)] == [3, 4, 5]
        finally:
            other.close()
