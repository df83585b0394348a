"""Keeper of ``serve --supervise`` against a device's process that is not in its right mind."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from support.fuse_files import FuseFiles, Op

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    IOEVENTFD,
    IRQ_SET,
    REGION_IO_FDS,
    Command,
    IrqSetFlags,
)
from vfiouser_virtio.serving.child_process import MOST_MESSAGES, Line
from vfiouser_virtio.serving.keeper.attendant import MOST, PING, PONG, RelayedListener
from vfiouser_virtio.serving.keeper.client_state import ClientState, Told
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.mappings import MAPPINGS
from vfiouser_virtio.serving.keeper.process import Beginning, DeviceProcess
from vfiouser_virtio.serving.keeper.relay import Relay
from vfiouser_virtio.serving.keeper.restarts import Pulse
from vfiouser_virtio.vfio_user.wire.connection import reply, request

_VERSION = b"\0\0\1\0{}\0"
_INFO, _QUEUE, _MAP, _IRQS = codec(REGION_IO_FDS), codec(IOEVENTFD), codec(DMA_MAP), codec(IRQ_SET)
_EVENTFD_TRIGGER = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER)
_EVENTFD_UNMASK = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK)


class Relayed(NamedTuple):
    """A relay with the other ends of its sockets: of a client that has negotiated a version, and of a device."""

    relay: Relay
    client: socket.socket
    device: socket.socket


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    ours, client = socket.socketpair()
    to_device, device = socket.socketpair()
    with client, device:
        relay = Relay(ours, DeviceLog(logging.getLogger(__name__), "test"))
        relay.attach(to_device, -1)
        relay.go_on()
        client.send(request(1, Command.VERSION, _VERSION))
        relay.from_client()
        device.send(reply(1, Command.VERSION, _VERSION))
        relay.from_device()
        yield Relayed(relay, client, device)
        relay.close()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "a reply of 0x0 bytes"),
        (_INFO.pack(_INFO.size, 0, 4, 2) + _QUEUE.pack(0, 2, 0, 0, 0, 0), "bytes for 0x2 queues"),
        (_INFO.pack(_INFO.size, 0, 4, 70000) + 70000 * _QUEUE.pack(0, 2, 0, 0, 0, 0)[:8], "for 0x11170 queues"),
    ],
)
def test_an_answer_about_queues_that_is_none(relayed: Relayed, body: bytes, what: str) -> None:
    data = memoryview(reply(0, Command.DEVICE_GET_REGION_IO_FDS, body))

    def send() -> None:
        rest = data
        while rest:
            rest = rest[relayed.device.send(rest[: 1 << 15]) :]
            relayed.relay.from_device()

    with pytest.raises(RelayError, match=what):
        send()


def test_a_notification_is_signalled_to_nothing_but_an_eventfd(relayed: Relayed) -> None:
    with open("/dev/null", "rb") as null:
        body = _INFO.pack(_INFO.size, 0, 4, 1) + _QUEUE.pack(0x3000, 2, 0, 0, 0, 0)
        answer = reply(0, Command.DEVICE_GET_REGION_IO_FDS, body)
        socket.send_fds(relayed.device, [answer], [null.fileno()])
        with pytest.raises(RelayError, match="no eventfd"):
            relayed.relay.from_device()


def _irqs(flags: int, start: int, count: int) -> bytes:
    return _IRQS.pack(_IRQS.size, flags, 2, start, count)


@pytest.mark.parametrize(
    ("command", "payload", "fds"),
    [
        (Command.DMA_MAP, b"", 1),
        (Command.DMA_UNMAP, b"", 0),
        (Command.DEVICE_SET_IRQS, b"", 1),
        (Command.DEVICE_SET_IRQS, _irqs(_EVENTFD_TRIGGER, 0, 0xFFFFFFFF), 1),
        (Command.DEVICE_SET_IRQS, _irqs(_EVENTFD_TRIGGER, 0, 1), 2),
        (Command.DEVICE_SET_IRQS, _irqs(_EVENTFD_UNMASK, 0, 2), 2),
        (Command.DMA_MAP, _MAP.pack(_MAP.size, 3, 0, 0x1000, 0x1000), 1),
    ],
)
def test_success_of_what_cannot_succeed(relayed: Relayed, command: Command, payload: bytes, fds: int) -> None:
    """The process of the device is at fault, and file descriptors are closed."""
    state = relayed.relay.told
    state.note(Command.DMA_MAP, _MAP.pack(_MAP.size, 3, 0, 0x1000, 0x1000), [])
    before = len(os.listdir("/proc/self/fd"))
    sent = [os.eventfd(0) for _ in range(fds)]
    with pytest.raises(ValueError, match=r"vectors|mapping|buffer"):
        state.note(command, payload, sent)
    assert len(os.listdir("/proc/self/fd")) == before
    relayed.device.recv(1 << 16)
    relayed.device.send(reply(0, Command.DEVICE_GET_REGION_IO_FDS, _INFO.pack(_INFO.size, 0, 4, 0)))
    relayed.relay.from_device()
    relayed.client.send(request(2, command, payload))
    relayed.relay.from_client()
    if fds < 2:
        relayed.device.send(reply(2, command))
        if "MAP" in command.name or not payload:
            with pytest.raises(RelayError, match="was answered with success"):
                relayed.relay.from_device()


def test_spare_file_descriptors_of_a_mapping_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    state = ClientState()
    for address in 0, 0x1000:
        state.note(Command.DMA_MAP, _MAP.pack(_MAP.size, 3, 0, address, 0x1000), [os.eventfd(0), os.eventfd(0)])
    state.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mapping_is_kept_without_what_follows_it() -> None:
    state = ClientState()
    state.note(Command.VERSION, _VERSION, [])
    mapping = _MAP.pack(_MAP.size, 3, 0, 0, 0x1000)
    state.note(Command.DMA_MAP, mapping + bytes(1 << 20), [])
    assert [*state.told()][-1] == (MAPPINGS, mapping + b"\xff\xff\xff\xff", [])


def test_an_interrupt_that_the_client_has_masked_stays_masked() -> None:
    """INTx, by SET_IRQS: told after its eventfd, which unmasks."""
    mask = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK)
    unmask = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK)
    masked: Told = (Command.DEVICE_SET_IRQS, _IRQS.pack(_IRQS.size, mask, 0, 0, 1), [])
    state = ClientState()
    state.note(Command.VERSION, _VERSION, [])

    def set_irqs(flags: int, count: int = 1, data: bytes = b"", fds: Sequence[int] = ()) -> bool:
        payload = _IRQS.pack(_IRQS.size + len(data), flags, 0, 0, count) + data
        state.note(Command.DEVICE_SET_IRQS, payload, list(fds))
        return [*state.told()][-1] == masked

    assert not set_irqs(_EVENTFD_TRIGGER, fds=[os.eventfd(0)])
    assert set_irqs(mask)
    assert not set_irqs(unmask)
    by_byte = int(IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_MASK)
    assert not set_irqs(by_byte, data=b"\0")
    assert set_irqs(by_byte, data=b"\1")
    assert not set_irqs(_EVENTFD_TRIGGER, fds=[os.eventfd(0)])
    assert set_irqs(mask)
    state.note(Command.DEVICE_RESET, b"", [])
    assert [*state.told()][-1] != masked
    assert set_irqs(mask)
    assert not set_irqs(int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER), count=0)
    state.close()


async def test_a_client_for_which_there_is_no_room_is_not_the_last() -> None:
    """Its connection did not arrive in the device's process, and is closed; the next one does."""
    keeper, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    with keeper, RelayedListener(device, "test") as listener:
        keeper.send(b"no room")
        socket.send_fds(keeper, [b"credentials!"], [keeper.fileno()])
        with trio.fail_after(60):
            connection = await listener.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12) == b"credentials!"


def _says(pong: bytes) -> Callable[[Line, Beginning], int]:
    def work(line: Line, begin: Beginning) -> int:
        begin.pulse.send(pong)
        line.send("sent")
        begin.pulse.recv(1)  # until we are killed
        return 0

    return work


def _floods(line: Line, begin: Beginning) -> int:
    for _ in range(20 * MOST_MESSAGES):
        line.send("more")
    return 0


def _hear(process: DeviceProcess, heard: list[object]) -> None:
    while len(heard) <= 10 * MOST_MESSAGES:
        heard += process.hear()


def test_messages_without_end() -> None:
    process = DeviceProcess(_floods, journal=-1, notifications=(), resuming=False, given_up=False, not_for_it=())
    heard: list[object] = []
    try:
        with pytest.raises(RelayError, match="messages without end"):
            _hear(process, heard)
        assert len(heard) <= MOST_MESSAGES
        assert process.hear() == []
    finally:
        process.kill()
        while process.reap() is None:
            pass
        process.close()


@pytest.mark.parametrize("answer", [b"!x", b"!", b"!-1", b"!1", b"!" + b"9" * 4000, b"R", b"anything"])
def test_an_answer_that_was_not_asked_for(answer: bytes) -> None:
    process = DeviceProcess(_says(answer), journal=-1, notifications=(), resuming=False, given_up=False, not_for_it=())
    try:
        while not process.hear():
            pass
        with pytest.raises(RelayError, match="which was not asked"):
            process.take_answers()
    finally:
        process.kill()
        while process.reap() is None:
            pass
        process.close()


def test_the_end_of_one_that_floods() -> None:
    process = DeviceProcess(_floods, journal=-1, notifications=(), resuming=False, given_up=False, not_for_it=())
    process.end(time.monotonic() + 60)


def test_a_question_for_which_there_is_no_room_was_not_asked() -> None:
    """It is asked later, under the same number, and until then does not make the process silent."""

    def answers_late(line: Line, begin: Beginning) -> int:
        os.eventfd_read(*begin.notifications)
        begin.pulse.setblocking(True)
        while message := begin.pulse.recv(MOST):
            begin.pulse.send(PONG + message[len(PING) :])
        return 0

    begin = os.eventfd(0)
    process = DeviceProcess(
        answers_late, journal=-1, notifications=[begin], resuming=False, given_up=False, not_for_it=()
    )
    try:
        asked = [process.ask() for _ in range(10_000)]
        assert asked[-2] == asked[-1] == len({*asked})
        os.eventfd_write(begin, 1)
        while process.silent:
            process.take_answers()
        assert process.has_answered(asked[-1] - 1)
        assert not process.has_answered(asked[-1])
        assert process.ask() == asked[-1]
        while process.silent:
            process.take_answers()
        assert process.has_answered(asked[-1])
    finally:
        process.kill()
        while process.reap() is None:
            pass
        process.close()
        os.close(begin)


def test_a_process_begins_without_threads(tmp_path: Path) -> None:
    """Also where its client's files are on a file system that hangs: else it could not go into its sandbox."""

    def counts(line: Line, begin: Beginning) -> int:
        line.send(len(os.listdir("/proc/self/task")))
        begin.clients.setblocking(True)
        begin.clients.recv(1)
        return 0

    with FuseFiles(tmp_path / "fuse", {"ram": b"memory"}, direct=False) as files:
        fd = os.open(files.folder / "ram", os.O_RDWR | os.O_CLOEXEC)
        files.hanging.add(Op.FLUSH)
        process = DeviceProcess(
            counts, journal=-1, notifications=(), resuming=False, given_up=False, not_for_it=[fd, fd]
        )
        try:
            while not (heard := process.hear()):
                pass
            assert heard == [1]
        finally:
            files.release()
            process.kill()
            while process.reap() is None:
                pass
            process.close()
            os.close(fd)


@pytest.mark.parametrize(("hang_after", "hangs"), [(3.0, True), (0.0, False)])
def test_none_is_taken_for_hung_where_that_is_not_wanted(hang_after: float, *, hangs: bool) -> None:
    """Although there are looks, at how much memory it has."""
    pulse = Pulse(hang_after)
    assert any(pulse.look(silent=True) for _ in range(100)) == hangs


def test_one_that_begins_has_longer() -> None:
    pulse = Pulse(3.0)
    looks = 1
    while not pulse.look(silent=True, begins=True):
        looks += 1
    assert looks == Pulse.LOOKS_AT_THE_BEGINNING
    assert not pulse.look(silent=False)
    assert [pulse.look(silent=True) for _ in range(Pulse.LOOKS)] == [*[False] * (Pulse.LOOKS - 1), True]
