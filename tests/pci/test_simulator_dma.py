"""Memory for a simulator that is reached by messages: each request gets one reply, also across a reset."""

import logging
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.pci.dma import Dma
from vfiouser_virtio.pci.simulator_dma import SimulatorDma
from vfiouser_virtio.pci.simulator_link import SimulatorLink, SimulatorMessage
from vfiouser_virtio.protocols.rtl_bridge import (
    DMA_CODEC,
    HEADER_CODEC,
    MAX_DMA,
    REPLY,
    RtlMessage,
    RtlStatus,
)

AT = 0x1_0000


class Client:
    """Its memory comes by messages, when `answers` is set."""

    name = "test"
    uid: int | None = None

    def __init__(self) -> None:
        self.answers = trio.Event()
        self.asked = 0

    async def dma_read(self, address: int, count: int) -> bytes:
        self.asked += 1
        await self.answers.wait()
        return bytes(count)

    async def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError


class Case:
    """What serves one simulator, whose end of the connection is ``theirs``."""

    def __init__(self) -> None:
        self.client, self.dma = Client(), Dma()
        self.dma.memory.attach(self.client)
        self.dma.memory.map(AT, MAX_DMA, readable=True, writable=True, fd=None, offset=0)
        self.dma.bus_master = True
        ours, self.theirs = socket.socketpair()
        self.link = SimulatorLink(ours)
        self.served = SimulatorDma(self.dma, [], DeviceLog(logging.getLogger(__name__), "card"))

    async def read(self, number: int, count: int) -> None:
        body = DMA_CODEC.pack(AT, count)
        await self.served.take(self.link, SimulatorMessage(RtlMessage.DMA_READ, False, 0, number, body))

    def replies(self) -> list[tuple[int, int]]:
        """Status and number of each that has come."""
        found: list[tuple[int, int]] = []
        while True:
            try:
                header = self.theirs.recv(HEADER_CODEC.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            size, kind, status, number = HEADER_CODEC.unpack(header)
            assert kind == RtlMessage.DMA_READ | REPLY
            self.theirs.recv(size - HEADER_CODEC.size) if size > HEADER_CODEC.size else b""
            found.append((status, number))


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    made = Case()
    yield made
    made.dma.memory.clear()
    made.link.close()
    made.theirs.close()


async def test_a_reset_answers_what_was_not_begun(case: Case) -> None:
    """The first in line had no reply where it had just come: its simulator waited for it for ever."""
    await case.read(1, 8)
    await case.read(2, 8)
    case.served.reset(case.link)
    assert case.replies() == [(RtlStatus.RESET, 1), (RtlStatus.RESET, 2)]


async def test_a_reset_answers_what_was_begun_once_and_first(case: Case) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(case.served.serve, case.link)
        await case.read(1, 8)
        await case.read(2, 8)
        await wait_all_tasks_blocked()
        assert case.client.asked == 1
        case.served.reset(case.link)
        nursery.cancel_scope.cancel()
    assert case.replies() == [(RtlStatus.RESET, 1), (RtlStatus.RESET, 2)]


async def test_replies_that_are_not_read_hold_up_the_rest(case: Case) -> None:
    case.client.answers.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(case.served.serve, case.link)
        for number in range(200):
            await case.read(number, MAX_DMA)
        await wait_all_tasks_blocked()
        assert 16 < case.client.asked < 100, "1 MiB is kept, and some is in the socket"
        nursery.cancel_scope.cancel()
