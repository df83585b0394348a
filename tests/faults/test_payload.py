"""Faults of what is in a device's buffers, whatever the device; and those of input devices."""

import pytest
import trio.testing

from vfiouser_virtio.devices.balloon import Balloon
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.protocols.virtio.input import ABSINFO, EVENT_CODEC, KEYS, Abs, Ev, Select, Syn
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running
from vfiouser_virtio.virtio import Device, Offer, queue

A = KEYS["a"]
DATA = 8  # where the input device's answers are


class Filling(Device):
    """It fills each buffer with 7s, and completes it as the driver's request says: with so many bytes."""

    device_id = 4
    requestq = queue(max_size=16)

    async def run(self) -> None:
        async for chain in self.requestq:
            count = int.from_bytes(chain.readable.read(1), "little")
            chain.writable.write(b"\7" * count)
            chain.complete()


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_what_was_written(private: bool, packed: bool) -> None:
    faults = ("data-zeros:at=2", "data-random:at=3", "data-random:at=4:from=1:bytes=2", "data-random:at=5:from=99")
    plan = FaultPlan(faults, seed=1)
    offer = Offer(packed=packed, poll="off")
    features = 1 << 34 if packed else 0
    async with running(Filling(), private=private, core=faulty_core(plan), offer=offer, features=features) as driver:
        found = []
        for _ in range(5):
            used = await driver.request([b"\x05"], [3, 5])
            assert used.written == 5
            written = b"".join(used.data)
            assert written[5:] == b"\xaa" * 3, "no more than was written"
            found.append(written[:5])
        assert found[0] == found[4] == b"\7" * 5
        assert found[1] == bytes(5)
        assert found[2] not in (bytes(5), b"\7" * 5)
        assert (found[3][:1], found[3][3:]) == (b"\7", b"\7\7")
        assert [entry["n"] for entry in plan.log.entries] == [2, 3, 4, 5]


async def test_random_bytes_are_those_of_the_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        async with running(Filling(), core=faulty_core(FaultPlan(["data-random"], seed=seed))) as driver:
            found.append((await driver.request([b"\x09"], [9])).data)
    assert found[0] == found[1] != found[2]


async def test_what_was_to_be_read_only(private: bool) -> None:
    plan = FaultPlan(["readable-overwritten:at=2"], seed=1)
    async with running(Filling(), private=private, core=faulty_core(plan)) as driver:
        for expected in (b"\x05", b"\xff"):
            address = driver.alloc(b"\x05")
            driver.add_raw(0, [(address, 1, 0), (driver.alloc(8), 8, 2)])
            driver.kick(0, force=True)
            await trio.testing.wait_all_tasks_blocked()
            assert driver.ram.read(address, 1) == expected
        assert not driver.status & NEEDS_RESET


async def test_an_entropy_device_that_gives_nothing() -> None:
    """Used length 0, or zeros."""
    plan = FaultPlan(["used-len-short:at=1", "data-zeros:at=2"], seed=1)
    async with running(Rng(), core=faulty_core(plan)) as driver:
        first, second, third = [await driver.request([], [64]) for _ in range(3)]
        assert first.written == 0
        assert (second.written, second.data) == (64, [bytes(64)])
        assert any(third.data[0])


async def test_a_balloon_that_wants_more_than_there_is() -> None:
    faults = ("config-value:field=num_pages:value=0xffffffff", "config-interrupt-spurious:at=1")
    async with running(Balloon(), core=faulty_core(FaultPlan(faults))) as driver:
        assert driver.config(0, 4) == 0xFFFFFFFF
        driver.kick(0, force=True)
        assert driver.config_interrupts == 1


# ---- input devices -------------------------------------------------------------------------------------------------


async def events(driver: Driver, count: int) -> list[tuple[int, ...]]:
    tokens = [driver.add(0, [], [8]) for _ in range(count)]
    driver.kick(0, force=True)
    return [EVENT_CODEC.unpack((await driver.wait(0, token)).data[0]) for token in tokens]


async def test_events(private: bool) -> None:
    plan = FaultPlan(["input-no-syn:at=1", "input-event:at=3:type=3:code=9:value=-2"], seed=1)
    async with running(keyboard := Input(), private=private, core=faulty_core(plan)) as driver:
        await keyboard.wait_running()
        await keyboard.press("a")
        found = await events(driver, 5)
        true = [(Ev.KEY, A, 1), (Ev.KEY, A, 1), (Ev.KEY, A, 0), (Ev.SYN, Syn.REPORT, 0)]
        assert [each for each in found if each != (3, 9, -2)] == true
        assert len(found) == 5
        assert [(entry["fault"], entry["n"]) for entry in plan.log.entries] == [("input-no-syn", 1), ("input-event", 3)]


async def test_an_axis_that_ends_before_it_begins() -> None:
    plan = FaultPlan(["input-absinfo:min=5:max=-5"])
    async with running(Input(kind="tablet"), core=faulty_core(plan)) as driver:
        before = driver.core.read_config(0, 136)
        driver.core.write_config(0, bytes([Select.ABS_INFO]))
        driver.core.write_config(1, bytes([Abs.X]))
        found = ABSINFO.parse(driver.core.read_config(DATA, ABSINFO.sizeof()))
        assert (found.min, found.max) == (5, -5)
        assert driver.config(DATA, 4) == 5
        assert driver.config(DATA + 4, 4) == (-5) & 0xFFFFFFFF
        driver.core.write_config(0, bytes([Select.ID_NAME]))
        driver.core.write_config(1, bytes([0]))
        assert driver.core.read_config(DATA, 8) == b"vfiouser"
        assert before != driver.core.read_config(0, 136)
