"""Registers whose answers come later, from a simulator, leave nothing for Python's collector."""

import logging
from pathlib import Path

import pytest
import trio
import trio.testing
from support.fake_simulator import FakeSimulator, fake_simulator
from support.garbage import check_no_garbage

from vfiouser_virtio.guest.function import GuestFunction
from vfiouser_virtio.protocols.rtl_bridge import RtlMessage

NOWHERE = 0xDEAD_0000


@pytest.fixture(autouse=True)
def _few_records(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged is kept for the report of a test."""
    caplog.set_level(logging.ERROR, "vfiouser_virtio")


async def read(card: GuestFunction, simulator: FakeSimulator, offset: int, size: int) -> None:
    """A read, for which the simulator is asked."""

    async def answer() -> None:
        asked = await simulator.expect(RtlMessage.READ)
        await simulator.answer(asked, bytes(asked.access[2]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        await card.bar[0].read(offset, size)


@pytest.mark.parametrize(("offset", "size"), [(0, 4), (0x100, 8), (0x0C, 8)])
async def test_reads(card: GuestFunction, path: Path, offset: int, size: int) -> None:
    """The last one is of a register beside it, too, which is here."""
    async with fake_simulator(path) as simulator:
        await check_no_garbage(lambda: read(card, simulator, offset, size))


async def test_simulators_that_come_and_go(card: GuestFunction, path: Path) -> None:
    async def turn() -> None:
        async with fake_simulator(path) as simulator:
            await read(card, simulator, 0, 4)
            await simulator.dma(RtlMessage.DMA_READ, NOWHERE, 16)
        await trio.testing.wait_all_tasks_blocked()

    await check_no_garbage(turn, 50)
