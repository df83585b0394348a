"""Watch of a network device's packets, receive buffers and commands (virtio 1.4, 5.1.9)."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.audit.types.net_commands import CommandWatch
from vfiouser_virtio.protocols.virtio.net import (
    GSO_UDP_TUNNEL,
    HDR_CODEC,
    MAX_MTU,
    GsoType,
    HdrFlags,
    NetFeature,
    hdr_size,
)
from vfiouser_virtio.virtio import DeviceCore

_SEND = "5.1.9.2.1 Packet Transmission"
_RECEIVE = "5.1.9.3.1 Setting Up Receive Buffers"
_PAIRS = "5.1.9.5.6.1 Automatic receive steering in multiqueue mode"

HEADER = must(
    "net/header", _SEND, "A packet has a header of the size that was negotiated.", "packets shorter than that"
)
NUM_BUFFERS = must("net/num-buffers", _SEND, "num_buffers of a packet is 0.", "the header of each packet")
FLAGS = must("net/flags", _SEND, "Without CSUM, flags of a packet are 0.", "the header of each packet")
GSO = {
    kind: must(
        f"net/gso-{kind.name.lower().replace('_', '-')}",
        _SEND,
        f"gso_type is {kind.name} only where {feature.name} was negotiated.",
        "the header of each packet",
    )
    for kind, feature in (
        (GsoType.TCPV4, NetFeature.HOST_TSO4),
        (GsoType.TCPV6, NetFeature.HOST_TSO6),
        (GsoType.UDP, NetFeature.HOST_UFO),
        (GsoType.UDP_L4, NetFeature.HOST_USO),
    )
}
_GSO_FEATURES = {
    GsoType.TCPV4: NetFeature.HOST_TSO4,
    GsoType.TCPV6: NetFeature.HOST_TSO6,
    GsoType.UDP: NetFeature.HOST_UFO,
    GsoType.UDP_L4: NetFeature.HOST_USO,
}
GSO_TUNNEL = must(
    "net/gso-tunnel",
    _SEND,
    "gso_type has a bit of UDP tunnels only where HOST_UDP_TUNNEL_GSO was negotiated, and one of them at most.",
    "the header of each packet",
)
GSO_CSUM = must("net/gso-csum", _SEND, "A packet with a gso_type has NEEDS_CSUM.", "the header of each packet")
GSO_SIZE = must("net/gso-size", _SEND, "A packet with a gso_type has a gso_size.", "the header of each packet")
TUNNEL_CSUM = must(
    "net/tunnel-csum",
    _SEND,
    "UDP_TUNNEL_CSUM is set only where that was negotiated, and with a bit of UDP tunnels.",
    "the header of each packet",
)
MTU = must(
    "net/mtu",
    "5.1.4.2 Device configuration layout",
    "With MTU, no packet without a gso_type is longer than mtu and its Ethernet header.",
    "length of each packet, less a header of 14 bytes and two VLAN tags",
)
RECEIVE_HEADER = must(
    "net/receive-header",
    _RECEIVE,
    "With MRG_RXBUF, a receive buffer has room for a header of the size that was negotiated.",
    "size of each receive buffer",
)
BUFFER = should(
    "net/receive-buffer",
    _RECEIVE,
    "Without MRG_RXBUF, a receive buffer has 1526 bytes, with segmentation 65601, with HASH_REPORT 8 more.",
    "size of each receive buffer",
)
BEFORE_PAIRS = must(
    "net/pairs-before",
    _PAIRS,
    "Packets are queued only on transmitq1 before VQ_PAIRS_SET.",
    "packets of other transmitqs before that command or RSS_CONFIG",
)
BEYOND_PAIRS = must(
    "net/pairs-beyond",
    _PAIRS,
    "No packets are queued on transmitqs beyond virtqueue_pairs.",
    "packets of such queues, but for those that are there when the command is taken",
)

_ETHERNET, _VLANS = 14, 2 * 4
# Of a receive buffer, by 5.1.9.3.1.
_ROOM, _GSO_ROOM, _HASH_ROOM = 1526, 65601, 8
_GUEST_GSO = (NetFeature.GUEST_TSO4.mask | NetFeature.GUEST_TSO6.mask | NetFeature.GUEST_UFO.mask) | (
    NetFeature.GUEST_USO4.mask | NetFeature.GUEST_USO6.mask
)


class NetWatch(RequestWatch):
    """Watch of all queues: of packets the headers."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._commands = CommandWatch(core, findings)
        self._queued: dict[int, int] = {}
        """Packets of each transmitq that were there when the driver changed the number of pairs, and are not taken."""

    def reset(self) -> None:
        """One pair is used."""
        self._commands.reset()
        self._queued.clear()

    def queue_reset(self, queue: int) -> None:
        """What was there is not, any more."""
        self._queued.pop(queue, None)

    def available(self, chain: SeenChain) -> None:
        """By queue; the control queue is behind all pairs that there are."""
        control = 2 * self._commands.most_pairs()
        if chain.queue == control:
            before = self._commands.pairs
            self._commands.available(chain)
            if self._commands.pairs != before:
                self._queued = {
                    index: self.waiting(index) for index in range(1, min(control, len(self.core.queues)), 2)
                }
        elif chain.queue % 2:
            self._packet(chain)
        else:
            self._receive_buffer(chain)

    def _receive_buffer(self, chain: SeenChain) -> None:
        features = self.core.driver_features
        rule = RECEIVE_HEADER
        if features & NetFeature.MRG_RXBUF.mask:
            least = hdr_size(features)
        else:
            rule = BUFFER
            least = _GSO_ROOM if features & _GUEST_GSO else _ROOM
            least += _HASH_ROOM if features & NetFeature.HASH_REPORT.mask else 0
        if chain.in_length < least:
            self.broke(rule, f"queue {chain.queue}: a receive buffer of {chain.in_length:#x} bytes; {least:#x} are due")

    def _packet(self, chain: SeenChain) -> None:
        features = self.core.driver_features
        size = hdr_size(features)
        where = f"queue {chain.queue}"
        number = chain.queue // 2 + 1
        earlier = self._queued.get(chain.queue, 0)
        self._queued[chain.queue] = max(earlier - 1, 0)
        if number > 1 and self._commands.pairs is None:
            self.broke(BEFORE_PAIRS, f"{where}: a packet before any VQ_PAIRS_SET")
        elif number > (self._commands.pairs or 1) and not earlier:
            self.broke(BEYOND_PAIRS, f"{where}: a packet, with {self._commands.pairs} pairs")
        if chain.out_length < size:
            self.broke(HEADER, f"{where}: a packet of {chain.out_length:#x} bytes, its header alone has {size:#x}")
            return
        raw = chain.peek(HDR_CODEC.size)
        if len(raw) < HDR_CODEC.size:
            return  # in memory that cannot be looked at now
        flags, gso, _, gso_size, _, _, buffers = HDR_CODEC.unpack(raw)
        if buffers:
            self.broke(NUM_BUFFERS, f"{where}: num_buffers {buffers:#x}")
        if flags and not self.accepted(NetFeature.CSUM):
            self.broke(FLAGS, f"{where}: flags {flags:#x} without CSUM")
        self._check_gso(where, flags, gso, gso_size)
        length = chain.out_length - size
        if not gso & ~GsoType.ECN and self.accepted(NetFeature.MTU):
            mtu = self.config("mtu", MAX_MTU)
            if length > mtu + _ETHERNET + _VLANS:
                self.broke(MTU, f"{where}: a packet of {length:#x} bytes, mtu is {mtu:#x}")

    def _check_gso(self, where: str, flags: int, gso: int, gso_size: int) -> None:
        tunnel = gso & GSO_UDP_TUNNEL
        kind = gso & ~GsoType.ECN & ~GSO_UDP_TUNNEL
        if flags & HdrFlags.UDP_TUNNEL_CSUM and not (tunnel and self.accepted(NetFeature.HOST_UDP_TUNNEL_GSO_CSUM)):
            self.broke(TUNNEL_CSUM, f"{where}: flags {flags:#x}, gso_type {gso:#x}")
        if tunnel and (tunnel == GSO_UDP_TUNNEL or not self.accepted(NetFeature.HOST_UDP_TUNNEL_GSO)):
            self.broke(GSO_TUNNEL, f"{where}: gso_type {gso:#x}")
        if not kind:
            return
        feature = _GSO_FEATURES.get(GsoType(kind)) if kind in {*GsoType} else None
        if feature is not None and not self.accepted(feature):
            self.broke(GSO[GsoType(kind)], f"{where}: gso_type {gso:#x} without {feature.name}")
        if not flags & HdrFlags.NEEDS_CSUM:
            self.broke(GSO_CSUM, f"{where}: gso_type {gso:#x}, flags {flags:#x}")
        if not gso_size:
            self.broke(GSO_SIZE, f"{where}: gso_type {gso:#x}, gso_size 0")
