"""Faults of what a network device writes: headers, lengths, answers, status, as its driver finds them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.net_cable import Cable, a_frame

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import HDR, HDR_HASH, CtrlClass, CtrlRx, NetFeature, Status
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, Used, running
from vfiouser_virtio.virtio import Offer

RX, CONTROL = 0, 2
ROOM = 1526
STATUS = 6  # where it is in the configuration
FRAME = a_frame(60)
HASHES = mask_of((NetFeature.CTRL_VQ, NetFeature.HASH_REPORT, NetFeature.RSS))
both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])


@asynccontextmanager
async def network(
    *faults: str, private: bool = False, features: int | None = None, packed: bool = False, hashes: bool = False
) -> AsyncIterator[tuple[Driver, Cable, FaultPlan]]:
    plan, cable = FaultPlan(faults, seed=1), Cable()
    net, offer = Net(netdev=cable, mac="52:54:00:12:34:56", hash=hashes), Offer(packed=packed, poll="off")
    core = faulty_core(plan)
    async with running(net, private=private, features=features, core=core, offer=offer) as driver:
        yield driver, cable, plan
        assert not driver.status & NEEDS_RESET, "the device does not blame the driver"


async def received(driver: Driver, cable: Cable, *frames: bytes, sizes: tuple[int, ...] = ()) -> list[Used]:
    """What the driver has in each of its buffers, of one frame each or of these sizes."""
    tokens = [driver.add(RX, [], [size]) for size in sizes or [ROOM] * len(frames)]
    driver.kick(RX, force=True)
    await cable.deliver(*frames)
    return [await driver.wait(RX, token) for token in tokens]


def header(used: Used) -> dict[str, int]:
    return {name: value for name, value in HDR.parse(used.data[0]).items() if name != "_io" and value}


@both_memories
@pytest.mark.parametrize(
    ("fault", "lie"),
    [
        ("net-num-buffers:at=2", {}),
        ("net-num-buffers:at=2:value=2", {"num_buffers": 2}),
        ("net-num-buffers:at=2:value=65535", {"num_buffers": 65535}),
        ("net-gso:at=2", {"gso_type": 1, "num_buffers": 1}),
        (
            "net-gso:at=2:type=0x85:size=7:hdr-len=0xfff0",
            {"gso_type": 0x85, "gso_size": 7, "hdr_len": 0xFFF0, "num_buffers": 1},
        ),
        ("net-csum:at=2", {"flags": 1, "csum_start": 0xFFFF, "csum_offset": 0xFFFF, "num_buffers": 1}),
        ("net-csum:at=2:start=34:offset=-1", {"flags": 1, "csum_start": 34, "csum_offset": 0xFFFF, "num_buffers": 1}),
        ("net-flags:at=2", {"flags": 0xFF, "num_buffers": 1}),
    ],
)
async def test_headers(fault: str, lie: dict[str, int], private: bool) -> None:
    """The second frame has it, and no other; what follows the header is as it was sent."""
    async with network(fault, private=private) as (driver, cable, plan):
        found = await received(driver, cable, FRAME, FRAME, FRAME)
        assert [header(used) for used in found] == [{"num_buffers": 1}, lie, {"num_buffers": 1}]
        assert [used.data[0][12 : used.written] for used in found] == [FRAME] * 3
        assert [entry["n"] for entry in plan.log.entries] == [2]


@both_memories
async def test_lengths(private: bool) -> None:
    faults = (
        "net-frame-short:at=1",
        "net-frame-short:at=2:len=13",
        "net-frame-short:at=3:len=-5",
        "net-frame-long:at=4",
    )
    async with network(*faults, private=private) as (driver, cable, _):
        found = await received(driver, cable, *[FRAME] * 5)
        assert [used.written for used in found] == [12, 25, 7, ROOM, 12 + len(FRAME)]
        assert found[3].data[0][12 + len(FRAME) :].count(b"\xaa") == ROOM - 12 - len(FRAME), "what was there before"


async def test_the_header_of_a_frame_in_several_buffers_is_in_the_first() -> None:
    """What is in the others is no header, and is not taken for one."""
    features = NetFeature.MRG_RXBUF.mask
    async with network("net-num-buffers:value=9", features=features) as (driver, cable, plan):
        long = a_frame(700)
        found = await received(driver, cable, long, long, sizes=(300,) * 6)
        assert [header(found[at])["num_buffers"] for at in (0, 3)] == [9, 9]
        whole = b"".join(used.data[0][: used.written] for used in found[:3])
        assert whole[12:] == long
        assert [entry["n"] for entry in plan.log.entries] == [1, 2]


async def test_hashes() -> None:
    async with network("net-hash:at=1:value=7", "net-hash:at=2", features=HASHES, hashes=True) as at:
        driver, cable, plan = at
        found = await received(driver, cable, FRAME, FRAME)
        first, second = (HDR_HASH.parse(used.data[0]) for used in found)
        assert (first.hash_value, first.hash_report, second.hash_report) == (7, 0xFFFF, 0xFFFF)
        assert second.hash_value not in (0, 7)
        assert len(plan.log.entries) == 2
    async with network("net-hash", features=0) as (driver, cable, plan):
        [used] = await received(driver, cable, FRAME)
        assert used.data[0][12 : used.written] == FRAME
        assert not plan.log.entries, "there is no such field"


@pytest.mark.parametrize(
    ("fault", "answers"), [("net-ack:at=2", [0, 1, 0]), ("net-ack:after=2:value=255", [0, 0, 255])]
)
async def test_answers_to_commands(fault: str, answers: list[int]) -> None:
    async with network(fault) as (driver, _, _):
        command = bytes([CtrlClass.RX, CtrlRx.PROMISC])
        found = [await driver.request([command, b"\1"], [1], queue=CONTROL) for _ in answers]
        assert [used.data[0][0] for used in found] == answers


async def test_the_link_goes_down_and_up() -> None:
    async with network("net-link-flap:at=2+3", "net-announce:at=4") as (driver, _, plan):
        seen = []
        for _ in range(5):
            before = driver.core.read_generation()
            driver.kick(RX, force=True)
            moved = driver.core.read_generation() != before
            seen.append((driver.config(STATUS, 2), driver.config_interrupts, moved))
        up, down = int(Status.LINK_UP), 0
        announce = up | Status.ANNOUNCE
        assert seen == [(up, 0, False), (down, 1, True), (up, 2, True), (announce, 3, True), (up, 3, False)]
        driver.kick(RX, force=True)
        assert [entry["fault"] for entry in plan.log.entries] == ["net-link-flap", "net-link-flap", "net-announce"]


async def test_the_link_is_what_it_is_after_a_reset() -> None:
    async with network("net-link-flap:at=1") as (driver, _, _):
        driver.kick(RX, force=True)
        assert driver.config(STATUS, 2) == 0
        await driver.reset()
        driver.probe()
        assert driver.config(STATUS, 2) == Status.LINK_UP


async def test_without_the_features_there_is_nothing_to_flap() -> None:
    async with network("net-link-flap", "net-announce", features=0) as (driver, _, plan):
        driver.kick(RX, force=True)
        assert driver.config_interrupts == 0
        assert not plan.log.entries


async def test_more_pairs_of_queues_than_there_are() -> None:
    async with network("config-value:field=max_virtqueue_pairs:value=0x8000") as (driver, _, _):
        assert driver.config(8, 2) == 0x8000


async def test_only_a_network_device_has_them() -> None:
    with pytest.raises(ConfigError, match="is for consoles, and net is none"):
        async with network("console-resize"):
            pass
