"""The fast path of register accesses: conversations, traces, many writes in one message."""

import errno
import itertools
import socket
import struct
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing
from support.echo_device import EchoDevice
from support.qemu_messages import (
    Connect,
    header,
    read,
    until,
    write,
)

from vfiouser_virtio.protocols.vfio_user import Direction
from vfiouser_virtio.vfio_device import PciRegion, VfioDevice
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.vfio_user.server import dispatch as dispatch_module
from vfiouser_virtio.vfio_user.server import session
from vfiouser_virtio.vfio_user.server.dispatch import WRITES_AT_ONCE, Response
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire import sockets
from vfiouser_virtio.vfio_user.wire.connection import Message


def converse(path: str, count: int) -> None:
    """A client that waits for every answer, as a guest's processor does: in a thread of its own, with no event loop."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        sock.sendall(header(1, 1, 20) + struct.pack("<HH", 0, 0))
        sock.recv(4096)
        for number in range(count):
            sock.sendall(header(number & 0xFFFF, 9, 32) + read(4, 0, 8))
            answer = sock.recv(4096)
            assert (len(answer), answer[:4]) == (40, header(number & 0xFFFF, 9, 40)[:4])


async def test_a_conversation_does_without_the_event_loop(
    qemu_listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sleeps(trio.abc.Instrument):
        count = 0

        def before_io_wait(self, timeout: float) -> None:
            self.count += timeout > 0

    monkeypatch.setattr(sockets, "LINGER_MS", 10_000)
    trio.lowlevel.add_instrument(sleeps := Sleeps())
    with trio.fail_after(60):
        await trio.to_thread.run_sync(converse, qemu_listener.name, 1000)
    assert sleeps.count < 20


async def test_others_run_during_a_conversation(qemu_listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LINGER_MS", 10_000)
    finished = trio.Event()

    async def talk() -> None:
        await trio.to_thread.run_sync(converse, qemu_listener.name, 1000)
        finished.set()

    turns = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk)
        with trio.fail_after(60):
            while not finished.is_set():
                turns += 1
                await trio.lowlevel.checkpoint()
    assert turns > 20


async def test_trace_sees_every_message(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, connect: Connect
) -> None:
    seen: list[tuple[Direction, int, bytes]] = []

    def trace(direction: Direction, message: Message) -> None:
        seen.append((direction, message.command, bytes(message.body)))

    nursery.start_soon(Server(device, trace=trace).serve, listener)
    client = connect()
    version = await client.version(None)
    await client.send(client.request(10, write(4, 0, b"x"), flags=0x10))
    reply = await client.call(9, read(4, 0, 1))
    inward, outward = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    assert seen == [
        (inward, 1, bytes(4)),
        (outward, 1, version.body),
        (inward, 10, write(4, 0, b"x")),
        (inward, 9, read(4, 0, 1)),
        (outward, 9, reply.body),
    ]


async def test_a_traced_session_takes_the_fast_path(
    nursery: trio.Nursery,
    device: EchoDevice,
    listener: Listener,
    connect: Connect,
) -> None:
    """What is traced is what runs without a trace: `dispatch` sees no region access."""
    dispatched: list[int] = []

    def dispatch(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
        dispatched.append(message.command)
        return dispatch_module.dispatch(device, message, negotiated)

    seen: dict[str, list[tuple[Direction, int]]] = {}

    def open_trace(name: str) -> Callable[[Direction, Message], None]:
        lines = seen[f"{name} {len(seen)}"] = []
        return lambda direction, message: lines.append((direction, message.command))

    watched = partial(Session, handler=dispatch)
    nursery.start_soon(Server(device, name="blk0", open_trace=open_trace, session=watched).serve, listener)
    inward, outward = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
    for number in range(2):
        client = connect()
        await client.version(None)
        assert (await client.call(10, write(4, 0, b"xy"))).error == 0
        assert (await client.call(9, read(4, 0, 2))).body[-2:] == b"xy"
        assert (await client.call(9, read(77, 0, 2))).error == errno.EINVAL
        client.close()
        await until(lambda: device.names().count("disconnected") == number + 1)  # noqa: B023 - called in this turn
    assert dispatched == []
    both = [(way, command) for command in (1, 10, 9, 9) for way in (inward, outward)]
    assert seen == {"blk0 0": both, "blk0 1": both}


async def test_write_multiple(nursery: trio.Nursery, device: EchoDevice, listener: Listener, connect: Connect) -> None:
    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    client = connect()
    assert b'"write_multiple":true' in (await client.version()).body
    body = struct.pack("<Q", 2) + struct.pack("<QII8s", 0, 4, 1, b"a") + struct.pack("<QII8s", 1, 4, 1, b"b")
    assert (await client.call(15, body)).body == struct.pack("<Q", 2)
    assert device.regions[4][:2] == b"ab"


async def test_many_writes_in_one_message_leave_others_their_turn_and_stay_in_order(
    nursery: trio.Nursery,
    device: EchoDevice,
    listener: Listener,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "perf_counter", lambda: float("inf"))  # each look at the clock says that it is time
    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    client = connect()
    await client.version()
    seen: list[int] = []

    async def neighbour() -> None:
        while True:
            seen.append(sum(call[0] == "region_write" for call in device.calls))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(neighbour)
    count = 5000
    body = struct.pack("<Q", count) + b"".join(
        struct.pack("<QII8s", at % 64, 4, 1, b"%c" % (at % 256)) for at in range(count)
    )
    await client.send(client.request(15, body) + client.request(10, write(4, 0, b"!")))
    assert (await client.receive()).body == struct.pack("<Q", count)
    assert (await client.receive()).command == 10
    writes = [call for call in device.calls if call[0] == "region_write"]
    assert [bytes(data) for *_, data in writes] == [b"%c" % (at % 256) for at in range(count)] + [b"!"]
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert max(steps) <= 2 * WRITES_AT_ONCE


@pytest.mark.parametrize("multiple", [False, True])
async def test_the_clock_is_looked_at_behind_each_write_to_config_space(
    nursery: trio.Nursery,
    device: EchoDevice,
    listener: Listener,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    multiple: bool,
) -> None:
    """Each may be a function level reset, which takes as long as the device's memory is big."""
    looks: list[int] = []

    def clock() -> float:
        looks.append(sum(call[0] == "region_write" for call in device.calls))
        return 0.0

    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    client = connect()
    await client.version()
    monkeypatch.setattr(session, "perf_counter", clock)
    config, count = PciRegion.CONFIG, 20
    if multiple:
        entry = struct.pack("<QII8s", 4, config, 1, b"a")
        await client.call(15, struct.pack("<Q", count) + entry * count)
    else:
        await client.send(b"".join(client.request(10, write(config, 4, b"a"), flags=0x10) for _ in range(count)))
        await client.call(9, read(config, 4, 1))
    assert set(range(1, count + 1)) <= set(looks)


@pytest.mark.parametrize("kind", ["writes", "long reads", "one message"])
async def test_each_access_that_may_take_long_gives_others_their_turns(
    nursery: trio.Nursery,
    device: EchoDevice,
    listener: Listener,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A write may be a reset of all queues, a read one of 1 MiB: 32 of them in one go took a quarter of a second."""
    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    client = connect()
    await client.version()
    clock = itertools.count()
    monkeypatch.setattr(session, "perf_counter", lambda: float("inf"))  # each look at the clock says that it is time
    monkeypatch.setattr(dispatch_module, "perf_counter", lambda: float(next(clock)))
    begun: list[int] = []

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            begun.append(sum(name.startswith("region") for name in device.names()))

    trio.lowlevel.add_instrument(steps := Steps())
    count = 20
    if kind == "writes":
        await client.send(b"".join(client.request(10, write(4, 0, b"a"), flags=0x10) for _ in range(count)))
    elif kind == "long reads":
        await client.send(b"".join(client.request(9, read(4, 0, 64)) for _ in range(count)))
    else:
        await client.send(client.request(15, struct.pack("<Q", count) + struct.pack("<QII8s", 0, 4, 1, b"a") * count))
    await until(lambda: sum(name.startswith("region") for name in device.names()) == count)
    trio.lowlevel.remove_instrument(steps)
    assert {after - before for before, after in itertools.pairwise([*begun, count])} == {0, 1}


async def test_a_refused_one_of_many_writes_is_the_answer(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, connect: Connect
) -> None:
    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    client = connect()
    await client.version()
    entries = [struct.pack("<QII8s", 0, 9 if at == 100 else 4, 1, b"a") for at in range(1000)]
    reply = await client.call(15, struct.pack("<Q", 1000) + b"".join(entries))
    assert reply.error == errno.EINVAL
    assert sum(call[0] == "region_write" for call in device.calls) >= 999
