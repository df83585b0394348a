"""Watch of a network device's control queue (virtio 1.4, 5.1.9.5)."""

from collections.abc import Mapping

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule, must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.audit.types.net_statistics import StatisticsWatch
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio.net import (
    ETH_ALEN,
    OFFLOAD_BITS,
    RSS_CONFIG,
    RSS_QUEUE,
    CtrlClass,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    NetFeature,
)
from vfiouser_virtio.virtio import DeviceCore

_FILTER = "5.1.9.5.1.2 Packet Receive Filtering"
_MAC = "5.1.9.5.2.2 Setting MAC Address Filtering"
_RSS = "5.1.9.5.7.2 Setting RSS parameters"
_COALESCING = "5.1.9.5.10.5 Notifications Coalescing"

RX = must(
    "net/rx-negotiated", _FILTER, "PROMISC and ALLMULTI are set only where CTRL_RX was negotiated.", "each command"
)
RX_EXTRA = must(
    "net/rx-extra-negotiated",
    _FILTER,
    "ALLUNI, NOMULTI, NOUNI and NOBCAST are set only where CTRL_RX_EXTRA was negotiated.",
    "each command",
)
MAC = must(
    "net/mac-negotiated", _MAC, "Commands of class MAC are sent only where CTRL_RX was negotiated.", "each command"
)
TABLE = must(
    "net/mac-table",
    _MAC,
    "MAC_TABLE_SET has a number and as many addresses, twice.",
    "length of the command's data, and both numbers, up to 64 KiB of it",
)
PAIRS = must(
    "net/pairs-range",
    "5.1.9.5.6.1 Automatic receive steering in multiqueue mode",
    "virtqueue_pairs is 1 to max_virtqueue_pairs.",
    "each VQ_PAIRS_SET",
)
PAIRS_CONFIGURED = must(
    "net/pairs-unconfigured",
    "5.1.9.5.6.1 Automatic receive steering in multiqueue mode",
    "Queues are configured before VQ_PAIRS_SET enables them.",
    "queue_enable of the first virtqueue_pairs pairs, when the device takes VQ_PAIRS_SET",
)
RSS = must("net/rss-negotiated", _RSS, "RSS_CONFIG is sent only where RSS was negotiated.", "each command")
RSS_POWER = must(
    "net/rss-table-size",
    _RSS,
    "indirection_table_mask is one less than a power of two, and less than rss_max_indirection_table_length.",
    "each RSS_CONFIG",
)
RSS_TYPES = must(
    "net/rss-hash-types", _RSS, "hash_types has no bit that supported_hash_types does not have.", "each RSS_CONFIG"
)
RSS_QUEUES = must(
    "net/rss-queues",
    _RSS,
    "indirection_table has only enabled receive queues.",
    "each entry of RSS_CONFIG, up to 64 KiB of it, and queue_enable of the queue that it names",
)
OFFLOADS = must(
    "net/offloads",
    "5.1.9.5.9.2 Setting Offloads State",
    "No offload is enabled whose feature was not negotiated.",
    "each GUEST_OFFLOADS_SET",
)
COALESCING = must(
    "net/coalescing-negotiated",
    _COALESCING,
    "TX_SET and RX_SET are sent only where NOTF_COAL was negotiated, VQ_SET and VQ_GET where VQ_NOTF_COAL was.",
    "each command",
)
COALESCING_QUEUE = must(
    "net/coalescing-queue",
    _COALESCING,
    "vq_index of VQ_SET and VQ_GET is that of an enabled receive or transmit queue.",
    "each such command",
)

_RX_RULES: Mapping[int, tuple[NetFeature, Rule]] = {
    CtrlRx.PROMISC: (NetFeature.CTRL_RX, RX),
    CtrlRx.ALLMULTI: (NetFeature.CTRL_RX, RX),
    **dict.fromkeys(
        (CtrlRx.ALLUNI, CtrlRx.NOMULTI, CtrlRx.NOUNI, CtrlRx.NOBCAST), (NetFeature.CTRL_RX_EXTRA, RX_EXTRA)
    ),
}
_TABLE_AT, _ENTRY = RSS_CONFIG.sizeof(), codec(RSS_QUEUE)
_GLOBAL = (CtrlNotfCoal.TX_SET, CtrlNotfCoal.RX_SET)


class CommandWatch(RequestWatch):
    """Watch of commands."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self.pairs: int | None = None
        """As the driver has asked for; None before it has."""
        self._statistics = StatisticsWatch(core, findings)

    def reset(self) -> None:
        """One pair is used."""
        self.pairs = None
        self._statistics.reset()

    def queue_reset(self, queue: int) -> None:
        """The commands in flight are the driver's again."""
        del queue
        self._statistics.reset()

    def used(self, queue: int, head: int) -> None:
        """The device has answered a command."""
        self._statistics.used(queue, head)

    def most_pairs(self) -> int:
        """Pairs that there are for this driver."""
        several = self.accepted(NetFeature.MQ) or self.accepted(NetFeature.RSS)
        return self.config("max_virtqueue_pairs", 1) if several else 1

    def available(self, chain: SeenChain) -> None:
        """One command."""
        raw = chain.peek()
        if len(raw) < 2:
            return
        kind, command, data = raw[0], raw[1], raw[2:]
        if kind == CtrlClass.RX and command in _RX_RULES:
            feature, rule = _RX_RULES[command]
            if not self.accepted(feature):
                self.broke(rule, f"{CtrlRx(command).name} without {feature.name}")
        elif kind == CtrlClass.MAC:
            self._mac(command, data, whole=len(raw) == chain.out_length)
        elif kind == CtrlClass.MQ:
            self._queues(command, data)
        elif kind == CtrlClass.GUEST_OFFLOADS:
            wanted = int.from_bytes(data[:8], "little")
            allowed = sum(1 << bit for feature, bit in OFFLOAD_BITS.items() if self.accepted(feature))
            if wanted & ~allowed:
                self.broke(OFFLOADS, f"offloads {wanted:#x}; with what was negotiated there are {allowed:#x}")
        elif kind == CtrlClass.NOTF_COAL:
            self._coalescing(command, data)
        elif kind == CtrlClass.STATS:
            self._statistics.command(command, data, chain, 2 * self.most_pairs())

    def _mac(self, command: int, data: bytes, *, whole: bool) -> None:
        if not self.accepted(NetFeature.CTRL_RX):
            # Setting the address is a matter of CTRL_MAC_ADDR, whatever this section says (5.1.3, CTRL_MAC_ADDR).
            if command != CtrlMac.ADDR_SET or not self.accepted(NetFeature.CTRL_MAC_ADDR):
                self.broke(MAC, f"command {command:#x} of class MAC without CTRL_RX")
        elif command == CtrlMac.TABLE_SET and whole:
            rest = data
            for _ in range(2):
                count = int.from_bytes(rest[:4], "little")
                if len(rest) < 4 + ETH_ALEN * count:
                    self.broke(TABLE, f"MAC_TABLE_SET with {len(data):#x} bytes, and a number of {count:#x} in it")
                    return
                rest = rest[4 + ETH_ALEN * count :]
            if rest:
                self.broke(TABLE, f"MAC_TABLE_SET with {len(rest):#x} bytes too many")

    def _queues(self, command: int, data: bytes) -> None:
        if command == CtrlMq.VQ_PAIRS_SET:
            pairs, most = int.from_bytes(data[:2], "little"), self.config("max_virtqueue_pairs", 1)
            if not 1 <= pairs <= most:
                self.broke(PAIRS, f"virtqueue_pairs {pairs:#x} of {most:#x}")
                return
            self.pairs = pairs
            missing = [index for index in range(2 * pairs) if not self._is_enabled(index)]
            if missing:
                self.broke(PAIRS_CONFIGURED, f"virtqueue_pairs {pairs:#x}, and queue {missing[0]:#x} is not enabled")
        elif command == CtrlMq.RSS_CONFIG:
            if not self.accepted(NetFeature.RSS):
                self.broke(RSS, "RSS_CONFIG without RSS")
                return
            self.pairs = self.config("max_virtqueue_pairs", 1)  # max_tx_vq is not a number of pairs
            types, mask = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
            if (mask + 1) & mask or mask >= self.config("rss_max_indirection_table_length", 1 << 16):
                self.broke(RSS_POWER, f"indirection_table_mask {mask:#x}")
            else:
                self._indirection_table(data[_TABLE_AT : _TABLE_AT + _ENTRY.size * (mask + 1)])
            if types & ~self.config("supported_hash_types", 0xFFFF_FFFF):
                self.broke(RSS_TYPES, f"hash_types {types:#x}")

    def _indirection_table(self, table: bytes) -> None:
        for (entry,) in _ENTRY.iter_unpack(table[: len(table) // _ENTRY.size * _ENTRY.size]):
            # Bit 15 is reserved, and none of the index: with it the entry names no queue.
            if entry >= self.most_pairs() or not self._is_enabled(2 * entry):
                self.broke(RSS_QUEUES, f"indirection_table has {entry:#x}")
                return

    def _is_enabled(self, index: int) -> bool:
        return index < len(self.core.queues) and self.core.queues[index].enabled

    def _coalescing(self, command: int, data: bytes) -> None:
        feature = NetFeature.NOTF_COAL if command in _GLOBAL else NetFeature.VQ_NOTF_COAL
        if not self.accepted(feature):
            self.broke(COALESCING, f"command {command:#x} of class NOTF_COAL without {feature.name}")
        elif command not in _GLOBAL:
            index = int.from_bytes(data[:2], "little")
            if index >= 2 * self.most_pairs() or not self._is_enabled(index):
                self.broke(COALESCING_QUEUE, f"vq_index {index:#x}")
