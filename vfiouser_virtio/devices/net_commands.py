"""Commands of a network device's control queue (virtio 1.4, 5.1.9.5): what each needs, checks and changes.

A command checks all of its data before it changes something, so that one that is refused has changed nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from vfiouser_virtio.devices.net_filter import MAX_MACS, ReceiveFilter
from vfiouser_virtio.devices.net_statistics import CAPABILITIES, Counter, statistics
from vfiouser_virtio.devices.net_steering import HASH_TYPES, MAX_TABLE, RssConfig, Steering
from vfiouser_virtio.devices.net_toeplitz import MAX_KEY
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import (
    ETH_ALEN,
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    CtrlStats,
    CtrlVlan,
    NetFeature,
    Status,
)
from vfiouser_virtio.virtio import Device, Queue

MAX_VLAN = 4095

_MAC_TABLE, _VLAN_ID, _MQ_PAIRS, _OFFLOADS = map(codec, (net.MAC_TABLE, net.VLAN_ID, net.MQ_PAIRS, net.OFFLOADS))
_RSS_CONFIG, _RSS_QUEUE, _RSS_TAIL = map(codec, (net.RSS_CONFIG, net.RSS_QUEUE, net.RSS_CONFIG_TAIL))
_HASH_CONFIG, _COAL, _COAL_VQ = map(codec, (net.HASH_CONFIG, net.COAL, net.COAL_VQ))


class CommandRefused(Exception):
    """Reason to answer ERR. Nothing has changed."""


@dataclass
class Settings:
    """Settings that commands change, beside the configuration of ``device``."""

    device: Device
    pairs: int
    """Pairs of queues that there are."""
    filter: ReceiveFilter
    steering: Steering
    set_offloads: Callable[[int], None]
    """The offloads that the driver takes from now on, as a mask of features."""
    counters: Sequence[Counter]
    """Of each queue but the control queue, in order."""
    command_num: int = 0
    """Commands since the last reset."""
    ok_num: int = 0
    """Those of them that were answered OK."""
    offloads: int | None = None
    """What the driver has changed its offloads to, as a mask of features; None: they are as negotiated."""

    @property
    def status(self) -> int:
        """``status`` of the configuration."""
        status = self.device.config["status"]
        assert isinstance(status, int)
        return status

    @property
    def data_queues(self) -> list[Queue]:
        """The queues for packets that there are with what was negotiated, in order: receiveq1, transmitq1, …"""
        several = self.device.negotiated(NetFeature.MQ) or self.device.negotiated(NetFeature.RSS)
        return self.device.queues[: 2 * (self.pairs if several else 1)]

    def change_offloads(self, features: int | None) -> None:
        """The driver takes these offloads from now on; None: those that it has negotiated."""
        self.offloads = features
        if features is not None:
            self.set_offloads(features)

    def check_pairs(self, pairs: int) -> None:
        """Raises CommandRefused for a number of pairs that cannot be used."""
        if not 0 < pairs <= self.pairs:
            raise CommandRefused(f"{pairs:#x} pairs of queues, of 0x1 to {self.pairs:#x}")


# ---- receive filter --------------------------------------------------------------------------------------------------


def _set_mode(mode: CtrlRx, to: Settings, data: bytes, _room: int) -> bytes:
    if data[0] > 1:
        raise CommandRefused(f"value {data[0]:#x} is neither 0 nor 1")
    to.filter.set_mode(mode, bool(data[0]))
    return b""


def _set_macs(to: Settings, data: bytes, _room: int) -> bytes:
    unicast, at = _macs(data, 0, group=False)
    multicast, at = _macs(data, at, group=True)
    if at != len(data):
        raise CommandRefused(f"{len(data) - at:#x} bytes follow its tables")
    to.filter.set_macs(unicast, multicast)
    return b""


def _set_mac(to: Settings, mac: bytes, _room: int) -> bytes:
    if mac[0] & 1 or not any(mac):
        raise CommandRefused(f"{mac.hex(':')} is no address that a station can have")
    if to.device.negotiated(NetFeature.MAC):
        to.device.config.set(mac=mac)
    to.filter.set_mac(mac)
    return b""


def _add_vlan(to: Settings, data: bytes, _room: int) -> bytes:
    to.filter.add_vlan(_vlan(data))
    return b""


def _remove_vlan(to: Settings, data: bytes, _room: int) -> bytes:
    to.filter.remove_vlan(_vlan(data))
    return b""


# ---- status, offloads ------------------------------------------------------------------------------------------------


def _announced(to: Settings, _data: bytes, _room: int) -> bytes:
    to.device.config.set(status=to.status & ~Status.ANNOUNCE)
    return b""


def _change_offloads(to: Settings, data: bytes, _room: int) -> bytes:
    (wanted,) = _OFFLOADS.unpack(data)
    features = 0
    for feature, bit in net.OFFLOAD_BITS.items():
        if wanted >> bit & 1:
            wanted ^= 1 << bit
            features |= feature.mask
    if wanted:
        raise CommandRefused(f"no offloads have the bits {wanted:#x}")
    if more := features & ~to.device.driver_features:
        names = [each.name for each in net.OFFLOAD_BITS if more & each.mask]
        raise CommandRefused(f"{', '.join(names)} not negotiated")
    to.change_offloads(features)
    return b""


# ---- queues ----------------------------------------------------------------------------------------------------------


def _set_pairs(to: Settings, data: bytes, _room: int) -> bytes:
    (pairs,) = _MQ_PAIRS.unpack(data)
    to.check_pairs(pairs)
    to.steering.set_pairs(pairs)
    return b""


def _set_rss(to: Settings, data: bytes, _room: int) -> bytes:
    if len(data) < _RSS_CONFIG.size:
        raise CommandRefused(f"its data have {len(data):#x} bytes only")
    types, mask, unclassified = _RSS_CONFIG.unpack_from(data)
    count = mask + 1
    if count & mask or count > MAX_TABLE:
        raise CommandRefused(f"a table of {count:#x} entries, where a power of two is expected, up to {MAX_TABLE:#x}")
    end = _RSS_CONFIG.size + count * _RSS_QUEUE.size
    if len(data) < end + _RSS_TAIL.size:
        raise CommandRefused(f"a table of {count:#x} entries and what follows it do not fit into {len(data):#x} bytes")
    table = [queue for (queue,) in _RSS_QUEUE.iter_unpack(data[_RSS_CONFIG.size : end])]
    if (largest := max(unclassified, *table)) >= to.pairs:
        raise CommandRefused(f"receive queue {largest:#x}, of 0x0 to {to.pairs - 1:#x}")
    pairs, length = _RSS_TAIL.unpack_from(data, end)
    to.check_pairs(pairs)
    key = _key(types, data[end + _RSS_TAIL.size :], length)
    to.steering.set_rss(RssConfig(unclassified, table), types, key, pairs)
    return b""


def _set_hash(to: Settings, data: bytes, _room: int) -> bytes:
    if len(data) < _HASH_CONFIG.size:
        raise CommandRefused(f"its data have {len(data):#x} bytes only")
    # Linux before 6.12 has a number of queues in what is reserved, as in the command for RSS.
    types, _, length = _HASH_CONFIG.unpack_from(data)
    key = _key(types, data[_HASH_CONFIG.size :], length)
    to.steering.set_hash(types, key)
    return b""


# ---- coalescing ------------------------------------------------------------------------------------------------------


def _coalesce_all(first: int, to: Settings, data: bytes, _room: int) -> bytes:
    max_packets, max_usecs = _COAL.unpack(data)
    for queue in to.data_queues[first::2]:
        queue.coalesce(max_packets, max_usecs)
    return b""


def _coalesce_one(to: Settings, data: bytes, _room: int) -> bytes:
    index, _, max_packets, max_usecs = _COAL_VQ.unpack(data)
    # When it is reset and enabled again, what was set for all of its kind holds (5.1.9.5.10.6).
    _enabled_queue(to, index).coalesce(max_packets, max_usecs, until_reset=True)
    return b""


def _say_coalescing(to: Settings, data: bytes, _room: int) -> bytes:
    index = _COAL_VQ.unpack(data + bytes(_COAL.size))[0]
    return _COAL.pack(*_enabled_queue(to, index).coalescing)


# ---- statistics ------------------------------------------------------------------------------------------------------


def _say_statistics(_to: Settings, _data: bytes, _room: int) -> bytes:
    return CAPABILITIES


def _get_statistics(to: Settings, data: bytes, room: int) -> bytes:
    queues = to.counters[: len(to.data_queues)]
    # This command is among those that are counted, and one that succeeds (5.1.9.5.11.3).
    own = {"command_num": to.command_num, "ok_num": to.ok_num + 1}
    try:
        return statistics(data, [*queues, own.__getitem__], to.device.driver_features, room)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


# ---- parts of commands -----------------------------------------------------------------------------------------------


def _macs(data: bytes, at: int, *, group: bool) -> tuple[list[bytes] | None, int]:
    """A table of addresses (None: too many), and where it ends. Raises CommandRefused."""
    start = at + _MAC_TABLE.size
    if len(data) < start:
        raise CommandRefused(
            f"{len(data) - at:#x} bytes instead of a table of {'multicast' if group else 'unicast'} addresses"
        )
    (entries,) = _MAC_TABLE.unpack_from(data, at)
    end = start + entries * ETH_ALEN
    if end > len(data):
        raise CommandRefused(f"a table of {entries:#x} addresses, of {len(data) - start:#x} bytes")
    if entries > MAX_MACS:
        return None, end
    macs = [data[place : place + ETH_ALEN] for place in range(start, end, ETH_ALEN)]
    for mac in macs:
        if bool(mac[0] & 1) != group:
            raise CommandRefused(f"{mac.hex(':')} among the {'multicast' if group else 'unicast'} addresses")
    return macs, end


def _vlan(data: bytes) -> int:
    vlan: int = _VLAN_ID.unpack(data)[0]
    if vlan > MAX_VLAN:
        raise CommandRefused(f"VLAN {vlan:#x}, of 0x0 to {MAX_VLAN:#x}")
    return vlan


def _enabled_queue(to: Settings, index: int) -> Queue:
    queues = to.data_queues
    if index >= len(queues) or not queues[index].enabled:
        raise CommandRefused(f"queue {index:#x} is no receive or transmit queue that is enabled")
    return queues[index]


def _key(types: int, data: bytes, length: int) -> bytes:
    """The hash key. More bytes may follow: Linux 6.12 sends one that pads its own structure."""
    if unknown := types & ~HASH_TYPES:
        raise CommandRefused(f"hash types {unknown:#x} are not among those that are supported, {HASH_TYPES:#x}")
    if length > MAX_KEY or (types and not length):
        raise CommandRefused(f"a key of {length:#x} bytes, of 0x1 to {MAX_KEY:#x}")
    if length > len(data):
        raise CommandRefused(f"a key of {length:#x} bytes, in {len(data):#x}")
    return data[:length]


# ---- the table -------------------------------------------------------------------------------------------------------


class ControlCommand(NamedTuple):
    """A command: what it needs, and what it does."""

    name: str
    features: int
    """One of these must have been negotiated."""
    size: int | None
    """Bytes of its data; None where that depends."""
    perform: Callable[[Settings, bytes, int], bytes]
    """Check and do it: gets its data and the room for its result, which it returns."""
    result: int = 0
    """Bytes that its result has at least."""


def _mode(mode: CtrlRx, feature: NetFeature) -> ControlCommand:
    return ControlCommand(f"RX_{mode.name}", feature.mask, 1, partial(_set_mode, mode))


COMMANDS: dict[tuple[int, int], ControlCommand] = {
    (CtrlClass.RX, CtrlRx.PROMISC): _mode(CtrlRx.PROMISC, NetFeature.CTRL_RX),
    (CtrlClass.RX, CtrlRx.ALLMULTI): _mode(CtrlRx.ALLMULTI, NetFeature.CTRL_RX),
    (CtrlClass.RX, CtrlRx.ALLUNI): _mode(CtrlRx.ALLUNI, NetFeature.CTRL_RX_EXTRA),
    (CtrlClass.RX, CtrlRx.NOMULTI): _mode(CtrlRx.NOMULTI, NetFeature.CTRL_RX_EXTRA),
    (CtrlClass.RX, CtrlRx.NOUNI): _mode(CtrlRx.NOUNI, NetFeature.CTRL_RX_EXTRA),
    (CtrlClass.RX, CtrlRx.NOBCAST): _mode(CtrlRx.NOBCAST, NetFeature.CTRL_RX_EXTRA),
    (CtrlClass.MAC, CtrlMac.TABLE_SET): ControlCommand("MAC_TABLE_SET", NetFeature.CTRL_RX.mask, None, _set_macs),
    (CtrlClass.MAC, CtrlMac.ADDR_SET): ControlCommand(
        "MAC_ADDR_SET", NetFeature.CTRL_MAC_ADDR.mask, ETH_ALEN, _set_mac
    ),
    (CtrlClass.VLAN, CtrlVlan.ADD): ControlCommand("VLAN_ADD", NetFeature.CTRL_VLAN.mask, _VLAN_ID.size, _add_vlan),
    (CtrlClass.VLAN, CtrlVlan.DEL): ControlCommand("VLAN_DEL", NetFeature.CTRL_VLAN.mask, _VLAN_ID.size, _remove_vlan),
    (CtrlClass.ANNOUNCE, CtrlAnnounce.ACK): ControlCommand(
        "ANNOUNCE_ACK", NetFeature.GUEST_ANNOUNCE.mask, 0, _announced
    ),
    (CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET): ControlCommand(
        "MQ_VQ_PAIRS_SET", NetFeature.MQ.mask, _MQ_PAIRS.size, _set_pairs
    ),
    (CtrlClass.MQ, CtrlMq.RSS_CONFIG): ControlCommand("MQ_RSS_CONFIG", NetFeature.RSS.mask, None, _set_rss),
    (CtrlClass.MQ, CtrlMq.HASH_CONFIG): ControlCommand("MQ_HASH_CONFIG", NetFeature.HASH_REPORT.mask, None, _set_hash),
    (CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET): ControlCommand(
        "GUEST_OFFLOADS_SET", NetFeature.CTRL_GUEST_OFFLOADS.mask, _OFFLOADS.size, _change_offloads
    ),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.TX_SET): ControlCommand(
        "NOTF_COAL_TX_SET", NetFeature.NOTF_COAL.mask, _COAL.size, partial(_coalesce_all, 1)
    ),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.RX_SET): ControlCommand(
        "NOTF_COAL_RX_SET", NetFeature.NOTF_COAL.mask, _COAL.size, partial(_coalesce_all, 0)
    ),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_SET): ControlCommand(
        "NOTF_COAL_VQ_SET", NetFeature.VQ_NOTF_COAL.mask, _COAL_VQ.size, _coalesce_one
    ),
    (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET): ControlCommand(
        "NOTF_COAL_VQ_GET", NetFeature.VQ_NOTF_COAL.mask, _COAL_VQ.size - _COAL.size, _say_coalescing, _COAL.size
    ),
    (CtrlClass.STATS, CtrlStats.QUERY): ControlCommand(
        "STATS_QUERY", NetFeature.DEVICE_STATS.mask, 0, _say_statistics, len(CAPABILITIES)
    ),
    (CtrlClass.STATS, CtrlStats.GET): ControlCommand("STATS_GET", NetFeature.DEVICE_STATS.mask, None, _get_statistics),
}
"""By class and command."""
