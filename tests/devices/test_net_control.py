"""Commands of the network device's control queue: what each changes, and what is refused and changes nothing.

A long file: one table of valid commands, which nearly all tests here go through, and what only one of them has.
"""

import itertools
import logging
from collections.abc import Callable

import pytest
from support.net_frames import MACS, TCP, ethernet, ipv4, tcp4, transport

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.devices.net_commands import COMMANDS, Settings
from vfiouser_virtio.devices.net_control import Control
from vfiouser_virtio.devices.net_filter import MAX_MACS, ReceiveFilter
from vfiouser_virtio.devices.net_steering import HASH_TYPES, MAX_TABLE, Steering
from vfiouser_virtio.devices.net_toeplitz import MAX_KEY
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import (
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    CtrlStats,
    CtrlVlan,
    HashReport,
    NetFeature,
    StatsType,
    Status,
)
from vfiouser_virtio.virtio import Device, Virtqueue

OWN, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("525400abcdef")
GROUP = bytes.fromhex("01005e000001")
OK, ERR = b"\0", b"\1"
PAIRS = 4
EVERYTHING = sum(feature.mask for feature in NetFeature)
CTRL = NetFeature.CTRL_VQ.mask


class Card(Device):
    """What the commands of a network device have before them, without its data path."""

    device_id = net.DEVICE_ID

    def __init__(self, features: int = EVERYTHING) -> None:
        super().__init__(config=net.Config(mac=OWN, status=Status.LINK_UP, max_virtqueue_pairs=PAIRS))
        self.driver_features = features
        self.told = 0
        self.config.on_change = self.tell
        for index in range(2 * PAIRS + 1):
            served = Virtqueue(index, 16, GuestMemory(), interrupt=self.tell, failed=self.fail, warn=print)
            served.enabled = True
            self.add_queue(16).attach(served)
        self.filter = ReceiveFilter()
        self.filter.begin(OWN, by_address=True, by_vlan=True)
        self.steering = Steering()
        self.offloads: list[int] = []
        settings = Settings(self, PAIRS, self.filter, self.steering, self.offloads.append, self.counters())
        self.control = Control(settings)

    def tell(self) -> None:
        self.told += 1

    def fail(self, error: Exception) -> None:
        raise error

    def counters(self) -> list[Callable[[str], int]]:
        """Those of each queue are different."""

        def counter(queue: int) -> Callable[[str], int]:
            return lambda name: 1000 * queue + sum(name.encode())

        return [counter(queue) for queue in range(2 * PAIRS)]

    def command(self, kind: int, command: int, data: bytes = b"", room: int = 1 << 20) -> bytes:
        return self.control.perform(bytes([kind, command]) + data, room)


@pytest.fixture
def card() -> Card:
    return Card()


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def table(*macs: bytes, claimed: int | None = None) -> bytes:
    return le(len(macs) if claimed is None else claimed, 4) + b"".join(macs)


def rss(
    types: int = HASH_TYPES,
    mask: int | None = None,
    unclassified: int = 0,
    queues: tuple[int, ...] = (0, 1, 2, 3),
    pairs: int = PAIRS,
    key: bytes = bytes(range(MAX_KEY)),
    length: int | None = None,
) -> bytes:
    return (
        le(types, 4)
        + le(len(queues) - 1 if mask is None else mask, 2)
        + le(unclassified, 2)
        + b"".join(le(queue, 2) for queue in queues)
        + le(pairs, 2)
        + le(len(key) if length is None else length, 1)
        + key
    )


def hashes(types: int = HASH_TYPES, key: bytes = bytes(range(MAX_KEY)), length: int | None = None) -> bytes:
    return le(types, 4) + bytes(8) + le(len(key) if length is None else length, 1) + key


# ---- all of them -----------------------------------------------------------------------------------------------------

VALID: dict[tuple[int, int], bytes] = {
    **{(CtrlClass.RX, mode): b"\1" for mode in CtrlRx},
    (CtrlClass.MAC, CtrlMac.TABLE_SET): table(OTHER) + table(GROUP),
    (CtrlClass.MAC, CtrlMac.ADDR_SET): OTHER,
    (CtrlClass.VLAN, CtrlVlan.ADD): le(5, 2),
    (CtrlClass.VLAN, CtrlVlan.DEL): le(5, 2),
    (CtrlClass.ANNOUNCE, CtrlAnnounce.ACK): b"",
    (CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET): le(2, 2),
    (CtrlClass.MQ, CtrlMq.RSS_CONFIG): rss(),
    (CtrlClass.MQ, CtrlMq.HASH_CONFIG): hashes(),
    (CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET): le(1 << 1, 8),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.TX_SET): le(5, 4) + le(6000, 4),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.RX_SET): le(7, 4) + le(8000, 4),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_SET): le(0, 2) + le(0xFFFF, 2) + le(9, 4) + le(10000, 4),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET): le(1, 2) + le(0xFFFF, 2),
    (CtrlClass.STATS, CtrlStats.QUERY): b"",
    (CtrlClass.STATS, CtrlStats.GET): le(0, 8) + le(1, 8),
}
# Of no queue: nothing.
STATS_GET = (CtrlClass.STATS, CtrlStats.GET)
every_command = pytest.mark.parametrize(
    ("command", "data"), VALID.items(), ids=[COMMANDS[command].name for command in VALID]
)


# Linux 6.12 pads its structure with a byte.
PADDED = {(CtrlClass.MQ, CtrlMq.RSS_CONFIG), (CtrlClass.MQ, CtrlMq.HASH_CONFIG)}


def test_each_command_is_tried_here() -> None:
    assert VALID.keys() == COMMANDS.keys()


@every_command
def test_a_valid_command(command: tuple[int, int], data: bytes, card: Card, caplog: pytest.LogCaptureFixture) -> None:
    assert card.command(*command, data)[:1] == OK
    assert not caplog.records


@every_command
def test_a_feature_that_was_not_negotiated(command: tuple[int, int], data: bytes) -> None:
    card = Card(EVERYTHING & ~COMMANDS[command].features)
    assert card.command(*command, data) == ERR
    assert Card(COMMANDS[command].features | NetFeature.GUEST_CSUM.mask).command(*command, data)[:1] == OK


@every_command
def test_any_other_length(command: tuple[int, int], data: bytes, card: Card) -> None:
    for other in {data[:count] for count in range(command == STATS_GET, len(data))}:
        assert card.command(*command, other) == ERR
    if command in PADDED:
        return
    assert card.command(*command, data + b"\0") == ERR
    assert card.control.settings.ok_num == 0
    assert unchanged(card)


@pytest.mark.parametrize("request_", [b"", b"\0", b"\0\6", b"\7\0\0\0\0\0", b"\x09\0", b"\xff\xff", b"\4\3\1\0"])
def test_no_command(request_: bytes, card: Card, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert card.control.perform(request_, 1000) == ERR
    assert len(caplog.records) == 1
    assert unchanged(card)


def unchanged(card: Card) -> bool:
    """Whether a driver has set nothing."""
    accepts = card.filter.accepts
    return (
        card.config["mac"] == OWN
        and card.steering.trivial
        and not card.offloads
        and [accepts(frame_of(to + OTHER + b"\x08\0")) for to in (OWN, OTHER, GROUP)] == [True, False, False]
        and not accepts(frame_of(OWN + OTHER + b"\x81\0\0\5"))
        and not any(any(queue.coalescing) for queue in card.queues)
    )


def test_what_no_driver_does_is_said_once(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        card.command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(9, 2))
        card.command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(0, 2))
    card.command(CtrlClass.VLAN, CtrlVlan.ADD, le(4096, 2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "MQ_VQ_PAIRS_SET of the driver is refused: 0x9 pairs of queues, of 0x1 to 0x4" in caplog.text
    assert "VLAN_ADD of the driver is refused: VLAN 0x1000, of 0x0 to 0xfff" in caplog.text


# ---- filter ----------------------------------------------------------------------------------------------------------


def test_receive_modes(card: Card) -> None:
    for mode in CtrlRx:
        assert card.command(CtrlClass.RX, mode, b"\2") == ERR
        assert unchanged(card)
    assert card.command(CtrlClass.RX, CtrlRx.PROMISC, b"\1") == OK
    assert card.filter.everything
    assert card.command(CtrlClass.RX, CtrlRx.PROMISC, b"\0") == OK
    assert not card.filter.everything
    assert card.command(CtrlClass.RX, CtrlRx.NOUNI, b"\1") == OK
    assert not card.filter.accepts(frame_of(OWN + OTHER))


def test_mac_tables(card: Card) -> None:
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, table(OTHER) + table(GROUP)) == OK
    assert card.filter.accepts(frame_of(OTHER + OWN))
    assert card.filter.accepts(frame_of(GROUP + OWN))
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, table() + table()) == OK
    assert unchanged(card)


@pytest.mark.parametrize(
    "data",
    [
        table(OTHER),
        table(OTHER) + table(GROUP)[:-1],
        table(OTHER, claimed=2) + table(GROUP),
        table(OTHER, claimed=0xFFFF_FFFF) + table(GROUP),
        table(OTHER) + table(GROUP, claimed=0xFFFF_FFFF),
        table(OTHER) + table(GROUP, claimed=0x2AAA_AAAB),  # times 6 is 2^32 + 2
        table(OTHER) + table(GROUP, claimed=0),
        table(OTHER, claimed=0) + table(GROUP),
        table(GROUP) + table(GROUP),
        table(OTHER) + table(OTHER),
        table(OTHER) + table(GROUP, OTHER),
    ],
)
def test_mac_tables_that_lie(card: Card, data: bytes) -> None:
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, data) == ERR
    assert unchanged(card)


def test_more_addresses_than_the_table_has_are_all_addresses(card: Card) -> None:
    groups = [b"\x33\x33\0\0" + number.to_bytes(2, "big") for number in range(MAX_MACS + 1)]
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, table() + table(*groups[1:])) == OK
    assert [card.filter.accepts(frame_of(to + OWN)) for to in (groups[0], groups[-1], GROUP)] == [False, True, False]
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, table() + table(*groups)) == OK
    assert [card.filter.accepts(frame_of(to + OWN)) for to in (groups[0], GROUP, OTHER)] == [True, True, False]
    singles = [b"\x02\x33\0\0" + number.to_bytes(2, "big") for number in range(MAX_MACS + 1)]
    assert card.command(CtrlClass.MAC, CtrlMac.TABLE_SET, table(*singles) + table()) == OK
    assert [card.filter.accepts(frame_of(to + OWN)) for to in (OTHER, GROUP)] == [True, False]


def test_another_address(card: Card) -> None:
    assert card.command(CtrlClass.MAC, CtrlMac.ADDR_SET, OTHER) == OK
    assert card.config["mac"] == OTHER
    assert card.told == 0  # the driver knows
    assert card.filter.accepts(frame_of(OTHER + OWN))
    assert not card.filter.accepts(frame_of(OWN + OTHER))
    for mac in (GROUP, bytes(6), b"\xff" * 6):
        assert card.command(CtrlClass.MAC, CtrlMac.ADDR_SET, mac) == ERR
    assert card.config["mac"] == OTHER


def test_without_the_feature_the_address_is_not_shown() -> None:
    card = Card(EVERYTHING & ~NetFeature.MAC.mask)
    assert card.command(CtrlClass.MAC, CtrlMac.ADDR_SET, OTHER) == OK
    assert card.config["mac"] == OWN
    assert card.filter.accepts(frame_of(OTHER + OWN))


def test_vlans(card: Card) -> None:
    tagged = frame_of(OWN + OTHER + b"\x81\0\x0f\xff")
    assert card.command(CtrlClass.VLAN, CtrlVlan.ADD, le(4095, 2)) == OK
    assert card.filter.accepts(tagged)
    assert card.command(CtrlClass.VLAN, CtrlVlan.DEL, le(4095, 2)) == OK
    assert not card.filter.accepts(tagged)
    for command in CtrlVlan:
        assert card.command(CtrlClass.VLAN, command, le(4096, 2)) == ERR


# ---- status, offloads ------------------------------------------------------------------------------------------------


def test_announcement(card: Card) -> None:
    assert card.control.announce()
    assert (card.config["status"], card.told) == (Status.LINK_UP | Status.ANNOUNCE, 1)
    assert card.command(CtrlClass.ANNOUNCE, CtrlAnnounce.ACK) == OK
    assert (card.config["status"], card.told) == (Status.LINK_UP, 1)
    assert card.command(CtrlClass.ANNOUNCE, CtrlAnnounce.ACK) == OK
    assert card.control.announce()
    card.control.reset()
    assert card.config["status"] == Status.LINK_UP
    card.driver_features = 0
    assert not card.control.announce()
    assert card.config["status"] == Status.LINK_UP


def test_offloads() -> None:
    accepted = NetFeature.GUEST_CSUM.mask | NetFeature.GUEST_TSO4.mask | NetFeature.GUEST_UDP_TUNNEL_GSO.mask
    card = Card(CTRL | NetFeature.CTRL_GUEST_OFFLOADS.mask | accepted)

    def change(*bits: int) -> bytes:
        return card.command(CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, le(sum(1 << bit for bit in bits), 8))

    assert change(1, 7, 46) == OK
    assert card.offloads == [accepted]
    assert change() == OK
    assert change(1) == OK
    assert card.offloads == [accepted, 0, NetFeature.GUEST_CSUM.mask]
    for bits in [(8,), (1, 7, 9), (10,), (47,), (54,), (0,), (17,), (63,), range(64)]:
        assert change(*bits) == ERR
    assert len(card.offloads) == 3


# ---- queues ----------------------------------------------------------------------------------------------------------


def test_pairs(card: Card) -> None:
    for pairs in (0, PAIRS + 1, 0x8000, 0x8001, 0xFFFF):
        assert card.command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(pairs, 2)) == ERR
        assert card.steering.pairs == 1
    for pairs in (PAIRS, 1, 2):
        assert card.command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(pairs, 2)) == OK
        assert card.steering.pairs == pairs
    card.control.reset()
    assert card.steering.pairs == 1


def test_rss(card: Card) -> None:
    assert card.command(CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(queues=(3,), unclassified=2, pairs=3)) == OK
    frame = tcp4("10.0.0.1", 1, "10.0.0.2", 2)
    assert card.steering.steer(frame)[::2] == (3, HashReport.TCPv4)
    assert card.steering.steer(frame_of(MACS + b"\x08\x06"))[0] == 2
    assert card.steering.pairs == 3
    longest = rss(queues=(1,) * MAX_TABLE)
    assert card.command(CtrlClass.MQ, CtrlMq.RSS_CONFIG, longest) == OK
    assert card.steering.steer(frame)[0] == 1
    assert card.command(CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(types=0, key=b"")) == OK
    assert card.steering.steer(frame)[::2] == (0, HashReport.NONE)


@pytest.mark.parametrize(
    "data",
    [
        rss(types=HASH_TYPES + 1),
        rss(types=1 << 9),
        rss(types=1 << 31),
        rss(queues=(0, 1, 2)),
        rss(queues=(0,) * 2 * MAX_TABLE),
        rss(mask=0xFFFF),
        rss(mask=7),
        rss(mask=2),
        rss(queues=(0, 1, 2, PAIRS)),
        rss(queues=(0, 0x8000)),  # a reserved bit
        rss(unclassified=PAIRS),
        rss(unclassified=0xFFFF),
        rss(pairs=0),
        rss(pairs=PAIRS + 1),
        rss(key=bytes(MAX_KEY + 1)),
        rss(key=b""),
        rss(length=0),
        rss(length=255),
        rss()[:-1],
    ],
)
def test_rss_that_cannot_be(card: Card, data: bytes) -> None:
    assert card.command(CtrlClass.MQ, CtrlMq.RSS_CONFIG, data) == ERR
    assert unchanged(card)


def test_a_key_that_is_padded_as_linux_does(card: Card) -> None:
    assert card.command(CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss() + b"\0") == OK
    assert not card.steering.trivial


def test_hash_reports(card: Card) -> None:
    frame = ethernet(ipv4("10.0.0.1", "10.0.0.2", TCP, transport(1, 2)))
    assert card.command(CtrlClass.MQ, CtrlMq.HASH_CONFIG, hashes()) == OK
    assert card.steering.steer(frame)[::2] == (0, HashReport.TCPv4)
    # Linux before 6.12 has its number of queues there.
    reserved = bytearray(hashes())
    reserved[10] = 2
    assert card.command(CtrlClass.MQ, CtrlMq.HASH_CONFIG, bytes(reserved)) == OK
    assert card.command(CtrlClass.MQ, CtrlMq.HASH_CONFIG, hashes(types=0, key=b"")) == OK
    assert card.steering.trivial
    for data in (hashes(types=1 << 9), hashes(key=bytes(41)), hashes(key=b""), hashes()[:-1]):
        assert card.command(CtrlClass.MQ, CtrlMq.HASH_CONFIG, data) == ERR
        assert unchanged(card)


# ---- coalescing ------------------------------------------------------------------------------------------------------


def coalescing(card: Card, index: int) -> tuple[int, int] | None:
    """What VQ_GET says."""
    answer = card.command(CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET, le(index, 2) + bytes(2), room=8)
    if answer == ERR:
        return None
    assert answer[:1] == OK
    assert len(answer) == 9
    return int.from_bytes(answer[1:5], "little"), int.from_bytes(answer[5:], "little")


def coalesce(card: Card, command: CtrlNotfCoal, packets: int, usecs: int, *, index: int | None = None) -> bytes:
    head = b"" if index is None else le(index, 2) + bytes(2)
    return card.command(CtrlClass.NOTF_COAL, command, head + le(packets, 4) + le(usecs, 4))


def test_the_last_command_that_names_a_queue_counts(card: Card) -> None:
    """The example of 5.1.9.5.10."""
    assert coalesce(card, CtrlNotfCoal.RX_SET, 1, 1000) == OK
    assert [coalescing(card, index) for index in range(4)] == [(1, 1000), (0, 0), (1, 1000), (0, 0)]
    assert coalesce(card, CtrlNotfCoal.VQ_SET, 2, 2000, index=0) == OK
    assert [coalescing(card, index) for index in range(4)] == [(2, 2000), (0, 0), (1, 1000), (0, 0)]
    assert coalesce(card, CtrlNotfCoal.VQ_SET, 4, 4000, index=1) == OK
    assert [coalescing(card, index) for index in range(4)] == [(2, 2000), (4, 4000), (1, 1000), (0, 0)]
    assert coalesce(card, CtrlNotfCoal.TX_SET, 5, 5000) == OK
    assert [coalescing(card, index) for index in range(4)] == [(2, 2000), (5, 5000), (1, 1000), (5, 5000)]
    assert card.queues[2 * PAIRS].coalescing == (0, 0)


def test_only_queues_for_packets_that_are_enabled(card: Card) -> None:
    for index in (2 * PAIRS, 2 * PAIRS + 1, 0xFFFF):
        assert coalesce(card, CtrlNotfCoal.VQ_SET, 2, 2000, index=index) == ERR
        assert coalescing(card, index) is None
    served = Virtqueue(3, 16, GuestMemory(), interrupt=card.tell, failed=card.fail, warn=print)
    card.queues[3].attach(served)
    assert coalesce(card, CtrlNotfCoal.VQ_SET, 2, 2000, index=3) == ERR
    assert coalescing(card, 3) is None
    assert coalesce(card, CtrlNotfCoal.TX_SET, 5, 5000) == OK  # for when it is
    served.enabled = True
    assert coalescing(card, 3) == (5, 5000)


def test_without_multiqueue_there_are_two_queues() -> None:
    card = Card(NetFeature.NOTF_COAL.mask | NetFeature.VQ_NOTF_COAL.mask)
    assert coalesce(card, CtrlNotfCoal.RX_SET, 1, 1000) == OK
    assert [queue.coalescing for queue in card.queues[:4]] == [(1, 1000), (0, 0), (0, 0), (0, 0)]
    assert coalesce(card, CtrlNotfCoal.VQ_SET, 2, 2000, index=2) == ERR


def test_what_is_set_has_to_be_said_in_whole(card: Card) -> None:
    for room in range(8):
        assert card.command(CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET, bytes(4), room=room) == ERR


# ---- statistics ------------------------------------------------------------------------------------------------------

RX = (StatsType.RX_BASIC, StatsType.RX_CSUM, StatsType.RX_GSO)
TX = (StatsType.TX_BASIC, StatsType.TX_CSUM, StatsType.TX_GSO)


def wanted(*of: tuple[int, tuple[StatsType, ...] | int]) -> bytes:
    return b"".join(
        codec(net.QUEUE_STATS).pack(queue, bytes(6), types if isinstance(types, int) else sum(1 << t for t in types))
        for queue, types in of
    )


def parse(result: bytes) -> list[tuple[int, StatsType, dict[str, int]]]:
    replies = []
    while result:
        header = net.STATS_REPLY_HDR.parse(result)
        kind = StatsType(header.type)
        assert header.size == 8 + net.STATS[kind].sizeof()
        values = net.STATS[kind].parse(result[8 : header.size])
        replies.append((header.vq_index, kind, {name: values[name] for name in values if not name.startswith("_")}))
        result = result[header.size :]
    return replies


def test_which_statistics_there_are(card: Card) -> None:
    answer = card.command(CtrlClass.STATS, CtrlStats.QUERY)
    assert answer == OK + le(sum(1 << kind for kind in (*RX, *TX, StatsType.CVQ)), 8)
    assert card.command(CtrlClass.STATS, CtrlStats.QUERY, room=8)[:1] == OK
    assert card.command(CtrlClass.STATS, CtrlStats.QUERY, room=7) == ERR


def test_statistics_of_every_queue(card: Card) -> None:
    card.command(CtrlClass.VLAN, CtrlVlan.ADD, le(5, 2))
    card.command(CtrlClass.VLAN, CtrlVlan.ADD, le(5000, 2))
    queues = [(queue, TX if queue % 2 else RX) for queue in range(2 * PAIRS)]
    answer = card.command(CtrlClass.STATS, CtrlStats.GET, wanted(*queues, (2 * PAIRS, (StatsType.CVQ,))))
    assert answer[:1] == OK
    replies = parse(answer[1:])
    assert [reply[:2] for reply in replies] == [
        *((queue, kind) for queue, kinds in queues for kind in kinds),
        (2 * PAIRS, StatsType.CVQ),
    ]
    assert replies.pop()[2] == {"command_num": 0, "ok_num": 2}  # counted by `answer`
    for queue, _, values in replies:
        assert values == {name: 1000 * queue + sum(name[3:].encode()) for name in values}


@pytest.mark.parametrize(
    "data",
    [
        wanted((2 * PAIRS + 1, (StatsType.CVQ,))),
        wanted((0xFFFF, RX)),
        wanted((0, TX)),
        wanted((1, RX)),
        wanted((0, (*RX, StatsType.RX_SPEED))),
        wanted((0, 1 << 63)),
        wanted((0, 1 << 4 | 1)),
        wanted((2 * PAIRS, RX)),
        wanted((0, (StatsType.CVQ,))),
        wanted((0, RX), (1, RX)),  # "the device MUST fail the entire command"
        wanted((0, RX))[:-1],
        wanted(*((0, RX),) * (2 * PAIRS + 2)),
    ],
)
def test_statistics_that_there_are_not(card: Card, data: bytes) -> None:
    assert card.command(CtrlClass.STATS, CtrlStats.GET, data) == ERR


@pytest.mark.parametrize(
    ("queue", "kind", "features"),
    [
        (0, StatsType.RX_CSUM, (NetFeature.GUEST_CSUM,)),
        (0, StatsType.RX_GSO, (NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6)),
        (1, StatsType.TX_CSUM, (NetFeature.CSUM,)),
        (1, StatsType.TX_GSO, (NetFeature.HOST_TSO4, NetFeature.HOST_TSO6, NetFeature.HOST_USO)),
    ],
)
def test_statistics_need_their_feature(queue: int, kind: StatsType, features: tuple[NetFeature, ...]) -> None:
    stats = NetFeature.DEVICE_STATS.mask
    data = wanted((queue, (kind,)))
    assert Card(stats).command(CtrlClass.STATS, CtrlStats.GET, data) == ERR
    for feature in features:
        assert Card(stats | feature.mask).command(CtrlClass.STATS, CtrlStats.GET, data)[:1] == OK


def test_without_multiqueue_the_control_queue_is_the_third() -> None:
    card = Card(NetFeature.DEVICE_STATS.mask)
    answer = card.command(CtrlClass.STATS, CtrlStats.GET, wanted((2, (StatsType.CVQ,))))
    assert [reply[:2] for reply in parse(answer[1:])] == [(2, StatsType.CVQ)]
    assert card.command(CtrlClass.STATS, CtrlStats.GET, wanted((3, TX))) == ERR


def test_as_many_statistics_as_there_is_room_for(card: Card) -> None:
    data = wanted((0, RX), (1, TX))
    whole = card.command(CtrlClass.STATS, CtrlStats.GET, data)[1:]
    ends = list(itertools.accumulate(8 + net.STATS[kind].sizeof() for kind in (*RX, *TX)))
    assert ends[-1] == len(whole)
    for room in (0, 1, *(end + more for end in ends for more in (-1, 0, 1))):
        fits = max((end for end in ends if end <= room), default=0)
        assert card.command(CtrlClass.STATS, CtrlStats.GET, data, room) == OK + whole[:fits]


def test_a_reset_forgets_what_was_set(card: Card) -> None:
    for (kind, command), data in VALID.items():
        assert card.command(kind, command, data)[:1] == OK
    card.control.reset()
    assert card.filter.everything
    assert card.steering.trivial
    assert card.control.settings.ok_num == 0
