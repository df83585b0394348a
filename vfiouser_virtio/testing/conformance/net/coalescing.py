"""Notification coalescing (virtio 1.4, 5.1.9.5.10): which settings are taken, and which hold."""

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.net import CtrlNotfCoal, NetFeature
from vfiouser_virtio.testing.conformance.checks import offers
from vfiouser_virtio.testing.conformance.net.control import SECTION
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver
from vfiouser_virtio.testing.conformance.verdicts import note

_SECTION = f"{SECTION} / Notifications Coalescing"
_F = NetFeature
_VQ, _BOTH = (_F.CTRL_VQ, _F.VQ_NOTF_COAL), (_F.CTRL_VQ, _F.VQ_NOTF_COAL, _F.NOTF_COAL)
_COAL, _COAL_VQ = codec(net.COAL), codec(net.COAL_VQ)
_RECEIVEQ, _TRANSMITQ, _FAR = 0, 1, 0xFFF0

Setting = tuple[int, int]
"""max_packets and max_usecs."""


async def _get(driver: ConformanceDriver, index: int, reserved: int = 0) -> Setting:
    """What VQ_GET says. Raises Failed where it is not OK."""
    data = _COAL_VQ.pack(index, reserved, 0, 0)[: -_COAL.size]
    answer = await driver.ok(CtrlNotfCoal.VQ_GET, data, room=_COAL.size)
    packets, usecs = _COAL.unpack(answer.result)
    return packets, usecs


async def _set(driver: ConformanceDriver, index: int, setting: Setting, reserved: int = 0) -> None:
    await driver.ok(CtrlNotfCoal.VQ_SET, _COAL_VQ.pack(index, reserved, *setting))


async def _expect(driver: ConformanceDriver, index: int, setting: Setting, when: str) -> None:
    seen = await _get(driver, index)
    note(seen == setting, f"queue {index}: max_packets and max_usecs are {seen} {when}, not {setting}")


@net_check(
    "virtio14/NN1",
    section=_SECTION,
    observe="VQ_SET and VQ_GET of the control queue, of a queue that there is not, and of one that is not enabled: ack",
    features=_VQ,
)
async def nn1(driver: ConformanceDriver) -> None:
    """VQ_SET and VQ_GET of what is no enabled receive or transmit queue are answered ERR."""
    await driver.start(*_VQ, *([_F.MQ] if driver.offers(_F.MQ) else []))
    wrong = {"of the control queue": await driver.control_index(), "of a queue that there is not": _FAR}
    if driver.has(_F.MQ) and await driver.max_pairs() > 1:
        wrong["of a queue that is not enabled"] = 2
    for why, index in wrong.items():
        await driver.refused(CtrlNotfCoal.VQ_SET, _COAL_VQ.pack(index, 0, 1, 1), why)
        data = _COAL_VQ.pack(index, 0, 0, 0)[: -_COAL.size]
        await driver.refused(CtrlNotfCoal.VQ_GET, data, why, room=_COAL.size)


@net_check(
    "virtio14/NN2",
    section=_SECTION,
    observe="VQ_SET and VQ_GET with all bits of reserved set: ack, and what VQ_GET says",
    features=_VQ,
)
async def nn2(driver: ConformanceDriver) -> None:
    """reserved is ignored."""
    await driver.start(*_VQ)
    await _set(driver, _RECEIVEQ, (5, 50), reserved=0xFFFF)
    seen = await _get(driver, _RECEIVEQ, reserved=0xFFFF)
    note(seen == (5, 50), f"max_packets and max_usecs are {seen}, not (5, 50)")


@net_check(
    "virtio14/NN3",
    section=_SECTION,
    observe="VQ_GET of both queues after VQ_SET of both and a reset",
    features=_VQ,
)
async def nn3(driver: ConformanceDriver) -> None:
    """All parameters are 0 after a reset."""
    for time in (1, 2):
        await driver.start(*_VQ)
        for index in (_RECEIVEQ, _TRANSMITQ):
            await _expect(driver, index, (0, 0), "at first" if time == 1 else "after a reset")
            await _set(driver, index, (6, 60))


@net_check(
    "virtio14/NN4",
    section=_SECTION,
    observe="VQ_GET after a queue was reset and enabled again: with VQ_SET before, and with RX_SET or TX_SET, too",
    features=_BOTH,
    needs=(offers(Feature.RING_RESET),),
)
async def nn4(driver: ConformanceDriver) -> None:
    """A queue that was disabled and enabled again has the parameters of TX_SET or RX_SET, or zeros without."""
    for index, command in ((_RECEIVEQ, CtrlNotfCoal.RX_SET), (_TRANSMITQ, CtrlNotfCoal.TX_SET)):
        await driver.start(*_BOTH, Feature.RING_RESET)
        await _set(driver, index, (7, 70))
        await _again(driver, index)
        await _expect(driver, index, (0, 0), "after it was enabled again")
        await driver.ok(command, _COAL.pack(8, 80))
        await _set(driver, index, (9, 90))
        await _again(driver, index)
        await _expect(driver, index, (8, 80), f"after {command.name}, VQ_SET, and when it was enabled again")


@net_check(
    "virtio14/NN5",
    section=_SECTION,
    observe="VQ_GET after each of RX_SET, VQ_SET of a receive queue, VQ_SET of a transmit queue, TX_SET",
    features=_BOTH,
)
async def nn5(driver: ConformanceDriver) -> None:
    """Of several commands for a queue the last one holds, whichever it is; other queues keep theirs."""
    await driver.start(*_BOTH)
    receive = transmit = (0, 0)
    for command, setting in (
        (CtrlNotfCoal.RX_SET, (10, 100)),
        (None, (11, 110)),
        (CtrlNotfCoal.TX_SET, (12, 120)),
        (CtrlNotfCoal.RX_SET, (13, 130)),
    ):
        if command is None:
            await _set(driver, _RECEIVEQ, setting)
        else:
            await driver.ok(command, _COAL.pack(*setting))
        if command is CtrlNotfCoal.TX_SET:
            transmit = setting
        else:
            receive = setting
        when = f"after {'VQ_SET of queue 0' if command is None else command.name} {setting}"
        await _expect(driver, _RECEIVEQ, receive, when)
        await _expect(driver, _TRANSMITQ, transmit, when)


async def _again(driver: ConformanceDriver, index: int) -> None:
    """Reset a queue, and enable it with a new ring."""
    bench = driver.bench
    await bench.select(index)
    await bench.set("queue_reset", 1)

    async def done() -> bool:
        return await bench.get("queue_reset") == 0 and await bench.get("queue_enable") == 0

    await bench.until(done, "queue_reset and queue_enable do not become 0")
    await driver.enable(index)
