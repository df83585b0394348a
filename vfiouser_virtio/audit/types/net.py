"""Watch of a network device's packets, receive buffers and commands (virtio 1.4, 5.1.9)."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.audit.types.net_commands import CommandWatch
from vfiouser_virtio.audit.types.net_frame import FrameWatch
from vfiouser_virtio.audit.types.net_header import HeaderWatch
from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.protocols.virtio.net import MAX_MTU, GsoType, NetFeature, hdr_codec, hdr_size
from vfiouser_virtio.virtio import DeviceCore

_SEND = "5.1.9.2.1 Packet Transmission"
_RECEIVE = "5.1.9.3.1 Setting Up Receive Buffers"
_PAIRS = "5.1.9.5.6.1 Automatic receive steering in multiqueue mode"

HEADER = must(
    "net/header", _SEND, "A packet has a header of the size that was negotiated.", "packets shorter than that"
)
NUM_BUFFERS = must("net/num-buffers", _SEND, "num_buffers of a packet is 0.", "the header of each packet")
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
    """Watch of all queues."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._commands = CommandWatch(core, findings)
        self._headers = HeaderWatch(core, findings)
        self._frames = FrameWatch(core, findings)
        self._queued: dict[int, int] = {}
        """Packets of each transmitq that were there when the driver changed the number of pairs, and are not taken."""

    def reset(self) -> None:
        """One pair is used."""
        self._commands.reset()
        self._queued.clear()

    def queue_reset(self, queue: int) -> None:
        """What was there is not, any more."""
        self._queued.pop(queue, None)
        if queue == self._control():
            self._commands.queue_reset(queue)

    def used(self, queue: int, head: int) -> None:
        """Of the control queue there are answers."""
        if queue == self._control():
            self._commands.used(queue, head)

    def _control(self) -> int:
        return 2 * self._commands.most_pairs()

    def available(self, chain: SeenChain) -> None:
        """By queue; the control queue is behind all pairs that there are."""
        control = self._control()
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
        codec = hdr_codec(self.core.driver_features)
        size = codec.size
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
        raw = chain.peek(size)
        if len(raw) < size:
            return  # in memory that cannot be looked at now
        fields = codec.unpack(raw)
        offload = Offload(*fields[:6], *fields[10:12])
        if fields[6]:
            self.broke(NUM_BUFFERS, f"{where}: num_buffers {fields[6]:#x}")
        self._headers.header(where, offload)
        self._frames.packet(where, chain, size, offload)
        length = chain.out_length - size
        if not offload.gso_type & ~GsoType.ECN and self.accepted(NetFeature.MTU):
            mtu = self.config("mtu", MAX_MTU)
            if length > mtu + _ETHERNET + _VLANS:
                self.broke(MTU, f"{where}: a packet of {length:#x} bytes, mtu is {mtu:#x}")
