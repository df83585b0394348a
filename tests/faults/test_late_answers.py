"""Register accesses that are answered late: what comes behind them waits, and no other client or device does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from support.connecting import raw_client
from support.qemu_messages import read, write

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR
from vfiouser_virtio.vfio_device import AnswerLater
from vfiouser_virtio.vfio_user import Server, listen_path

QUEUES = 3
HOUR = 3600
NUM_QUEUES = read(VIRTIO_BAR, COMMON + COMMON_CFG_OFFSETS["num_queues"][0], 2)
STATUS = read(VIRTIO_BAR, COMMON + COMMON_CFG_OFFSETS["device_status"][0], 1)
ACKNOWLEDGE = write(VIRTIO_BAR, COMMON + COMMON_CFG_OFFSETS["device_status"][0], b"\1")


def disk(*faults: str) -> FaultyPci:
    return FaultyPci(Blk(size=1 << 20, num_queues=QUEUES), faults=FaultPlan(faults, seed=1))


@asynccontextmanager
async def served(path: Path, function: FaultyPci) -> AsyncIterator[None]:
    """The function on a socket, each call of whose client takes as long as the device wants, by the test's clock."""
    with listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.serve)
            nursery.start_soon(Server(function).serve, listener)
            yield
            nursery.cancel_scope.cancel()


async def negotiated(path: Path) -> RawClient:
    client = raw_client(str(path))
    client.timeout = 2 * HOUR
    await client.version()
    return client


async def got(client: RawClient, payload: bytes) -> tuple[int, float]:
    """The value of a register, and how long it took to come."""
    asked = trio.current_time()
    reply = await client.call(Command.REGION_READ, payload)
    assert (reply.flags, reply.error) == (MessageFlags.REPLY, 0)
    return int.from_bytes(reply.body[len(payload) :], "little"), trio.current_time() - asked


async def test_a_read_is_answered_late(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    function, neighbour = disk("register-read-late:at=2:time=3s"), disk()
    async with served(tmp_path / "late", function), served(tmp_path / "other", neighbour):
        client, other = await negotiated(tmp_path / "late"), await negotiated(tmp_path / "other")
        assert await got(client, NUM_QUEUES) == (QUEUES, 0)
        began = trio.current_time()
        # Two more at once, and a write that nothing answers between them: in order, and nothing is lost.
        await client.send(client.request(Command.REGION_READ, NUM_QUEUES))
        await client.send(client.request(Command.REGION_WRITE, ACKNOWLEDGE, flags=MessageFlags.NO_REPLY))
        await client.send(client.request(Command.REGION_READ, STATUS))
        assert await got(other, NUM_QUEUES) == (QUEUES, 0)
        assert trio.current_time() == began, "the neighbour has waited"
        replies = [(await client.receive(), trio.current_time() - began) for _ in range(2)]
        assert [(reply.body[16:], after) for reply, after in replies] == [(b"\3\0", 3), (b"\1", 3)]
        assert await got(client, NUM_QUEUES) == (QUEUES, 0)
        client.close()
        other.close()
    assert [(entry["n"], entry["did"]) for entry in function.faults.log.entries] == [(2, "answered 3 s later")]


@pytest.mark.parametrize("posted", [True, False])
async def test_a_write_is_answered_late(tmp_path: Path, posted: bool, autojump_clock: trio.testing.MockClock) -> None:
    function = disk("register-write-late:at=1:time=3s")
    async with served(tmp_path / "late", function):
        client = await negotiated(tmp_path / "late")
        flags = MessageFlags.NO_REPLY if posted else 0
        await client.send(client.request(Command.REGION_WRITE, ACKNOWLEDGE, flags=flags))
        began = trio.current_time()
        if not posted:
            assert (await client.receive()).body == ACKNOWLEDGE[:16]
            assert trio.current_time() == began + 3
        assert await got(client, STATUS) == (1, 3 if posted else 0)
        client.close()


async def test_what_waits_can_be_answered_late_itself(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It is not on the short path, as the first is: `dispatch` has it as a whole message."""
    function = disk("register-read-late:count=2:time=3s")
    async with served(tmp_path / "late", function):
        client = await negotiated(tmp_path / "late")
        for _ in range(2):
            await client.send(client.request(Command.REGION_READ, NUM_QUEUES))
        began, times = trio.current_time(), []
        for _ in range(2):
            assert (await client.receive()).body[16:] == b"\3\0"
            times.append(trio.current_time() - began)
        assert times == [3, 6]
        client.close()


async def test_the_next_client_does_not_wait(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    function = disk(f"register-read-late:at=1:time={HOUR}s")
    async with served(tmp_path / "late", function):
        client = await negotiated(tmp_path / "late")
        await client.send(client.request(Command.REGION_READ, NUM_QUEUES))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        client.close()
        client = await negotiated(tmp_path / "late")
        assert await got(client, NUM_QUEUES) == (QUEUES, 0)
        assert trio.current_time() == began
        await client.send(client.request(Command.REGION_READ, NUM_QUEUES))
        client.close()
    assert trio.current_time() == began, "the end has waited"


async def test_where_nothing_can_wait_it_is_answered_at_once() -> None:
    """A function that is not served yet; and one with no time to wait."""
    function = disk("register-read-late", "register-write-late:time=0ms")
    assert function.region_read(VIRTIO_BAR, COMMON, 4)
    function.region_write(VIRTIO_BAR, COMMON, bytes(4))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        await trio.testing.wait_all_tasks_blocked()
        function.region_write(VIRTIO_BAR, COMMON, bytes(4))
        with pytest.raises(AnswerLater):
            function.region_read(VIRTIO_BAR, COMMON, 4)
        function.disconnected()
        nursery.cancel_scope.cancel()
