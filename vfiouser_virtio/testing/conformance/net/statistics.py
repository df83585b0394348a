"""Device statistics (virtio 1.4, 5.1.9.5.11): what the device replies, and to what it must not."""

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import CtrlStats, NetFeature, StatsType
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.control import OFF, SECTION
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, ControlAnswer
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note

_SECTION = f"{SECTION} / Device Statistics"
_F = NetFeature
_STATS = (_F.CTRL_VQ, _F.DEVICE_STATS)
_QUERY, _ENTRY, _HDR = codec(net.STATS_CAPABILITIES), codec(net.QUEUE_STATS), codec(net.STATS_REPLY_HDR)
_RECEIVEQ, _TRANSMITQ, _FAR = 0, 1, 0xFFF0
_UNKNOWN = 1 << 50
_CANARY = 0xA5


def _entry(index: int, *kinds: StatsType, more: int = 0) -> bytes:
    """One queue, and what is wanted of it."""
    return _ENTRY.pack(index, bytes(6), sum(1 << kind for kind in kinds) | more)


def _size(kind: StatsType) -> int:
    return _HDR.size + codec(net.STATS[kind]).size


async def _start(driver: ConformanceDriver, *features: NetFeature) -> int:
    """Bring the device up; the kinds of statistics that it has. Raises Failed."""
    await driver.start(*_STATS, *features)
    answer = await driver.ok(CtrlStats.QUERY, room=_QUERY.size)
    kinds: int = _QUERY.unpack(answer.result)[0]
    return kinds


async def _basic(driver: ConformanceDriver) -> None:
    """Start a device that has the statistics which need no other feature. Raises NotApplicable."""
    kinds = await _start(driver)
    for kind in (StatsType.RX_BASIC, StatsType.TX_BASIC):
        if not kinds >> kind & 1:
            raise NotApplicable(f"needs {kind.name} supported")


@net_check(
    "virtio14/NS1",
    section=_SECTION,
    observe="STATS_QUERY: ack, used length, and the bits of the result",
    features=_STATS,
)
async def ns1(driver: ConformanceDriver) -> None:
    """STATS_QUERY is answered with the kinds of statistics that the device has."""
    await driver.start(*_STATS)
    answer = await driver.ok(CtrlStats.QUERY, room=_QUERY.size)
    note(answer.used == 1 + _QUERY.size, f"{answer.used:#x} bytes are used, of ack and {_QUERY.size:#x}")
    kinds: int = _QUERY.unpack(answer.result)[0]
    unknown = kinds & ~sum(1 << kind for kind in StatsType)
    note(not unknown, f"supported_stats_types is {kinds:#x}, with the unknown bits {unknown:#x}")


@net_check(
    "virtio14/NS2",
    section=_SECTION,
    observe="STATS_GET of a queue that there is not, of kinds that are unknown, or of another queue or feature: ack",
    features=_STATS,
)
async def ns2(driver: ConformanceDriver) -> None:
    """One wrong entry fails the whole STATS_GET."""
    await _basic(driver)
    good = _entry(_RECEIVEQ, StatsType.RX_BASIC)
    wrong = {
        "of a queue that there is not": _entry(_FAR, StatsType.RX_BASIC),
        "of an unknown kind": _entry(_RECEIVEQ, StatsType.RX_BASIC, more=_UNKNOWN),
        "of TX_BASIC of a receive queue": _entry(_RECEIVEQ, StatsType.TX_BASIC),
        "of RX_BASIC of a transmit queue": _entry(_TRANSMITQ, StatsType.RX_BASIC),
        "of RX_CSUM without GUEST_CSUM": _entry(_RECEIVEQ, StatsType.RX_CSUM),
        "of TX_CSUM without CSUM": _entry(_TRANSMITQ, StatsType.TX_CSUM),
    }
    for why, entry in wrong.items():
        await driver.refused(CtrlStats.GET, entry, why, room=256)
        await driver.refused(CtrlStats.GET, good + entry, f"{why}, after a good entry,", room=256)


@net_check(
    "virtio14/NS3",
    section=_SECTION,
    observe="STATS_GET of each kind that is supported, with its features: type, vq_index and size of the reply",
    features=_STATS,
)
async def ns3(driver: ConformanceDriver) -> None:
    """Each reply has its type, the index of its queue, and its size with the header."""
    more = [each for each in (_F.CSUM, _F.GUEST_CSUM, _F.GUEST_TSO4, _F.HOST_TSO4) if driver.offers(each)]
    kinds = await _start(driver, *more)
    needs = {StatsType.RX_CSUM: _F.GUEST_CSUM, StatsType.TX_CSUM: _F.CSUM}
    needs |= {StatsType.RX_GSO: _F.GUEST_TSO4, StatsType.TX_GSO: _F.HOST_TSO4}
    for kind in StatsType:
        if not kinds >> kind & 1 or not (kind not in needs or driver.has(needs[kind])):
            continue
        index = await _queue_of(driver, kind)
        answer = await driver.ok(CtrlStats.GET, _entry(index, kind), room=_size(kind))
        seen = _HDR.unpack_from(answer.result)
        wanted = (kind, index, _size(kind))
        said = seen[0], seen[2], seen[4]
        note(said == wanted, f"{kind.name}: type, vq_index and size are {said}, not {tuple(map(int, wanted))}")
        note(answer.used == 1 + _size(kind), f"{kind.name}: {answer.used:#x} bytes are used, of {1 + _size(kind):#x}")


async def _queue_of(driver: ConformanceDriver, kind: StatsType) -> int:
    if kind is StatsType.CVQ:
        return await driver.control_index()
    return _RECEIVEQ if kind < StatsType.TX_BASIC else _TRANSMITQ


@net_check(
    "virtio14/NS4",
    section=_SECTION,
    observe="STATS_GET of two kinds, with room for one and a half, and for more than two: used length, bytes behind it",
    features=_STATS,
)
async def ns4(driver: ConformanceDriver) -> None:
    """The device fills the result only up to the valid bytes, whatever room there is."""
    await _basic(driver)
    wanted = _entry(_RECEIVEQ, StatsType.RX_BASIC) + _entry(_TRANSMITQ, StatsType.TX_BASIC)
    one, both = _size(StatsType.RX_BASIC), _size(StatsType.RX_BASIC) + _size(StatsType.TX_BASIC)
    for room in (one + 20, both + 64):
        answer = await driver.ok(CtrlStats.GET, wanted, room=room)
        written = answer.used - 1
        note(written <= min(room, both), f"{written:#x} bytes of result are used, of {min(room, both):#x}")
        behind = answer.result[max(written, 0) if room < both else both :]
        note(
            not behind.strip(bytes([_CANARY])), f"room for {room:#x} bytes: those behind the replies were written, too"
        )


@net_check(
    "virtio14/NS5",
    section=f"{_SECTION} / Controlq Statistics",
    observe="command_num and ok_num after commands of which one fails, in the replies to two STATS_GET",
    features=_STATS,
)
async def ns5(driver: ConformanceDriver) -> None:
    """command_num counts all commands, ok_num those that succeed, the current one included."""
    if not await _start(driver) >> StatsType.CVQ & 1:
        raise NotApplicable("needs CVQ supported")
    before = await _values(driver, StatsType.CVQ)
    await driver.command((0xFF, 0), OFF)
    await driver.command(CtrlStats.QUERY, room=_QUERY.size)
    after = await _values(driver, StatsType.CVQ)
    # The query has been the first command since the reset, and this reading the second. They may be more: no sentence
    # says that a reset makes them zero.
    note(before["command_num"] >= 2, f"command_num is {before['command_num']} in the second command")
    gone = {name: after[name] - before[name] for name in before}
    note(gone == {"command_num": 3, "ok_num": 2}, f"three commands later, of which two were OK: {gone} more")


@net_check(
    "virtio14/NS6",
    section=f"{_SECTION} / Transmitq Basic Statistics",
    observe="tx_packets, tx_bytes and tx_drops before and after three packets",
    features=_STATS,
)
async def ns6(driver: ConformanceDriver) -> None:
    """tx_packets counts the packets that were sent, tx_drops those that were dropped."""
    await _basic(driver)
    before = await _values(driver, StatsType.TX_BASIC)
    for _ in range(3):
        await driver.send(frames.frame(frames.BROADCAST, 100))
    after = await _values(driver, StatsType.TX_BASIC)
    more = {name: after[name] - before[name] for name in ("tx_packets", "tx_bytes", "tx_drops")}
    note(more["tx_packets"] + more["tx_drops"] == 3, f"three packets later: {more}")
    note(more["tx_bytes"] == 100 * more["tx_packets"], f"three packets of 100 bytes later: {more}")


async def _values(driver: ConformanceDriver, kind: StatsType) -> dict[str, int]:
    """One kind of statistics, by name."""
    data = _entry(await _queue_of(driver, kind), kind)
    answer: ControlAnswer = await driver.ok(CtrlStats.GET, data, room=_size(kind))
    expect(answer.used == 1 + _size(kind), f"{answer.used:#x} bytes are used, of {1 + _size(kind):#x}")
    parsed = net.STATS[kind].parse(answer.result[_HDR.size :])
    return {name: int(value) for name, value in parsed.items() if not name.startswith("_")}
