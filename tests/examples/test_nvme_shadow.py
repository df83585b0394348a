"""Doorbells in memory of examples/pci/nvme.py: a driver that rings when it is asked to, and drivers that do not."""

import struct

import pytest
import trio
from pci.nvme import Nvme
from support.in_process_driver import InProcessDriver, driving
from support.nvme_driver import CSTS, DATA, FATAL, READY, Completion, NvmeDriver, Pair

from vfiouser_virtio.virtio.offer import Poll

MIB = 1 << 20
READ = 0x02
SHADOW, WANTED = 0x70000, 0x71000
CONFIGURE = 0x7C


class ShadowDriver(NvmeDriver):
    """Driver that rings as the specification says, in annex B.5."""

    rung = 0

    async def start(self, size: int = 8) -> Pair:
        await self.enable()
        pair = await self.create(size=size)
        assert (await self.command(CONFIGURE, prp1=SHADOW, prp2=WANTED)).status == 0
        return pair

    def _word(self, address: int) -> int:
        word: int = struct.unpack("<I", self.driver.get(address, 4))[0]
        return word

    def _tell(self, index: int, value: int) -> None:
        old = self._word(SHADOW + 4 * index)
        self.driver.put(SHADOW + 4 * index, value.to_bytes(4, "little"))
        wanted = self._word(WANTED + 4 * index)
        if (value - wanted - 1) % 0x10000 < (value - old) % 0x10000:
            self.rung += 1
            self.driver.write(0x1000 + 4 * index, value)

    def ring(self, pair: Pair) -> None:
        if pair.number:
            self._tell(2 * pair.number, pair.tail)
        else:
            super().ring(pair)

    def reap(self, pair: Pair, *, acknowledge: bool = True) -> list[Completion]:
        found = super().reap(pair, acknowledge=acknowledge and not pair.number)
        if found and pair.number and acknowledge:
            self._tell(2 * pair.number + 1, pair.head)
        return found


@pytest.mark.parametrize("poll", ["off", "adaptive"])
@pytest.mark.parametrize("messages", [True, False], ids=["msix", "intx"])
async def test_each_command_is_seen(poll: Poll, messages: bool) -> None:
    async with driving(Nvme(size=MIB, poll=poll)) as machine:
        driver = ShadowDriver(machine)
        pair = await driver.start()
        if messages:
            machine.function.region_write(7, 0x42, b"\x00\x80")
            assert machine.function.msix_enabled
        for turn in range(100):
            wanted = [driver.submit(pair, READ, turn, 0, 0, nsid=1, prp1=DATA) for _ in range(1 + turn % 7)]
            driver.ring(pair)
            await machine.settle()
            assert [each.cid for each in driver.reap(pair)] == wanted
            await machine.settle()
            assert not machine.interrupted, "all were taken"
        assert machine.read(CSTS) == READY
        if messages:
            assert driver.rung < 150, "it is to ring for commands, and hardly ever for what it has taken"


async def test_intx_is_down_with_the_access_that_takes_the_last() -> None:
    """QEMU asks behind that access whether it is still up, and asserts it again: the driver would find nothing."""
    async with driving(Nvme(size=MIB)) as machine:
        driver = ShadowDriver(machine)
        pair = await driver.start()
        for turn in range(20):
            driver.submit(pair, READ, turn, 0, 0, nsid=1, prp1=DATA)
            driver.ring(pair)
            await machine.settle()
            assert machine.interrupted
            assert len(driver.reap(pair)) == 1
            assert not machine.interrupted, "before any task had its turn"


async def test_an_older_value_in_the_register_is_none() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = ShadowDriver(machine)
        pair = await driver.start()
        for turn in range(5):
            assert await driver.io(pair, READ, turn, 1) == 0
        for old in (0, 2, 4, 7):
            machine.write(0x1008, old)
            await machine.settle()
        assert driver.reap(pair) == []
        assert await driver.io(pair, READ, 0, 1) == 0


async def test_completions_wait_for_room_and_are_shown_when_the_driver_rings() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        machine.function.region_write(7, 0x42, b"\x00\x80")
        driver = ShadowDriver(machine)
        pair = await driver.start(size=4)
        wanted: list[int] = []
        seen: list[int] = []
        for _ in range(3):
            wanted += [driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA) for _ in range(3)]
            driver.ring(pair)
            await machine.settle()
        for _ in range(9):
            seen += [each.cid for each in driver.reap(pair)]
            await machine.settle()
        assert seen == wanted[: len(seen)]
        assert len(seen) >= 6, "what the driver had not put over others"


async def shadow_word(machine: InProcessDriver, index: int, value: int) -> None:
    machine.put(SHADOW + 4 * index, value.to_bytes(4, "little"))
    machine.write(0x1000 + 4 * index, 0)
    await machine.settle()


async def test_values_that_cannot_be_are_events() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = ShadowDriver(machine)
        pair = await driver.start()
        for index, value in ((2, 8), (2, 0xFFFF_FFFF), (3, 5), (3, 0xFFFF_FFFF)):
            await shadow_word(machine, index, value)
            await shadow_word(machine, index, 0)
        assert (await driver.command(0x0C)).result == 0x0001_0100
        assert await driver.io(pair, READ, 0, 1) == 0
        assert machine.read(CSTS) == READY


async def test_a_tail_that_cannot_be_does_not_end_a_controller_that_polls() -> None:
    """It is there at each look, and nothing to be done; `settle` is none of this one, which never waits."""
    async with driving(Nvme(size=MIB, poll="on")) as machine:
        driver = ShadowDriver(machine)
        await driver.enable()
        pair = await driver.create(size=8)
        driver.submit(driver.admin, CONFIGURE, prp1=SHADOW, prp2=WANTED)
        driver.ring(driver.admin)
        with trio.fail_after(60):
            while not driver.reap(driver.admin):
                await trio.sleep(0.001)
            machine.put(SHADOW + 8, b"\x08\0\0\0")
            machine.write(0x1008, 0)
            driver.submit(driver.admin, 0x0C)  # which comes back with the event
            driver.ring(driver.admin)
            while not (told := driver.reap(driver.admin)):
                await trio.sleep(0.001)
            assert told[0].result == 0x0001_0100
            cid = driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA)
            driver.ring(pair)
            while not (done := driver.reap(pair)):
                await trio.sleep(0.001)
        assert [each.cid for each in done] == [cid]


async def test_pages_that_cannot_be_are_refused() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        assert (await driver.identify(1))[257] == 1
        for prp1, prp2, status in (
            (SHADOW + 4, WANTED, 0x13),
            (SHADOW, WANTED + 4, 0x13),
            (0xFEBF_0000, WANTED, 0x04),
            (SHADOW, 0xFEBF_0000, 0x04),
        ):
            assert (await driver.command(CONFIGURE, prp1=prp1, prp2=prp2)).status == status


async def test_they_are_not_offered_where_a_look_takes_a_message() -> None:
    async with driving(Nvme(size=MIB), by_message=True) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        assert (await driver.identify(1))[257] == 0
        assert (await driver.command(CONFIGURE, prp1=SHADOW, prp2=WANTED)).status == 0x02


async def test_pages_that_go_away_are_fatal_until_a_reset() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = ShadowDriver(machine)
        pair = await driver.start()
        assert await driver.io(pair, READ, 0, 1) == 0
        assert machine.function.dma_unmap(0, MIB) is None
        machine.write(0x1008, 3)
        await machine.settle()
        assert machine.read(CSTS) == READY | FATAL
