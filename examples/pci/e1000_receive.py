"""Reception of an 82540EM: which frames its driver is to see, and the way into its buffers.

Facts: see e1000.py; filters (§3.2.1, §13.4.22, §13.5), descriptors (§3.2.3), sizes of buffers (§13.4.22).

::

    address │ length, checksum, status, errors, special      all but the address is ours, once the frame is there
"""

import struct
import zlib
from typing import TYPE_CHECKING

import trio
from pci.e1000_banks import FCS, MPC, RNBC, ROC, TORL, TPR

from vfiouser_virtio.backends.net.headers import HEAD, IPV4, TCP, UDP, find_headers
from vfiouser_virtio.backends.net.segmentation import UDP_CHECK, ones_complement_sum
from vfiouser_virtio.pci import DmaFault, Register, field, flag

if TYPE_CHECKING:
    from pci.e1000 import E1000

MIN_LENGTH = 60
MAX_STANDARD, MAX_LONG = 1522, 16384
"""Bytes of a frame with FCS, without and with RCTL.LPE."""
DD, EOP, IXSM, VP, TCPCS, IPCS, PIF = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40, 0x80
"""Status: done, end of packet, no checksum was looked at, VLAN, TCP's or UDP's was, IP's was, no exact match."""
TCPE, IPE = 0x20, 0x40
"""Errors: a checksum that is wrong."""
IPOFL, TUOFL = 0x100, 0x200
"""RXCSUM: look at IP's checksum, at TCP's and UDP's."""
RXDMT0, RXT0 = 0x10, 0x80
"""Causes of an interrupt: few buffers are left, something was received."""
BURST = 16
"""Frames after which other devices have their turns."""
BROADCAST = b"\xff" * 6
_WRITE_BACK = struct.Struct("<HHBBH")


class ReceiveControl(Register):
    enable = flag(1)
    unicast_promiscuous = flag(3)
    multicast_promiscuous = flag(4)
    long_packets = flag(5)
    threshold = field(9, 8)
    """RDMTS: RXDMT0 comes when a half of the ring is left, a quarter, or an eighth."""
    multicast_offset = field(13, 12)
    broadcast = flag(15)
    buffer_size = field(17, 16)
    vlan_filter = flag(18)
    big_buffers = flag(25)
    strip_crc = flag(26)


class Receiver:
    """The receive ring of a card, and its filters."""

    def __init__(self, card: "E1000") -> None:
        self.card, self.ring = card, card.rings[0]

    def reset(self) -> None:
        """Power-on state."""
        self.card.nic.receiving = False
        self.card.nic.flush()
        self.card.nic.report.driver_left()
        self._few_told = False
        self.addresses_changed()

    # ---- filters -------------------------------------------------------------------------------------------------

    def addresses_changed(self) -> None:
        """The driver has written one."""
        self._addresses: frozenset[bytes | None] | None = None

    def wants(self, head: bytes) -> bool:
        """Whether the driver is to see a frame."""
        card = self.card
        if card.rctl.vlan_filter and int.from_bytes(head[12:14], "big") == card.vet.value:
            vlan = int.from_bytes(head[14:16], "big") & 0xFFF
            if not card.vfta[vlan >> 5].value >> (vlan & 31) & 1:
                return False
        return self._match(head[:6]) is not None

    def _match(self, target: bytes) -> int | None:
        """What the filters say of an address: status bits, or None where it is none of the driver's."""
        rctl = self.card.rctl
        if self._addresses is None:
            self._addresses = frozenset(each.mac for each in self.card.addresses)
        if target in self._addresses:
            return 0
        if target == BROADCAST:
            return 0 if rctl.broadcast or rctl.multicast_promiscuous else None
        if len(target) == 6 and target[0] & 1:
            return PIF if rctl.multicast_promiscuous or self._in_table(target) else None
        return PIF if rctl.unicast_promiscuous else None

    def _in_table(self, target: bytes) -> bool:
        bits = int.from_bytes(target[4:], "little") >> (4, 3, 2, 0)[self.card.rctl.multicast_offset] & 0xFFF
        return bool(self.card.mta[bits >> 5].value >> (bits & 31) & 1)

    # ---- frames --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Give the driver what comes, until cancelled."""
        nic = self.card.nic
        while True:
            for _ in range(BURST):
                frame = await nic.receive()
                try:
                    await self._deliver(bytearray(frame.ljust(MIN_LENGTH, b"\0")))
                except DmaFault as fault:
                    self.card.log.once("receive ring", "a frame for the driver is dropped: %s", fault)
                    self.card.statistics[0].count(MPC)
                if not nic.waiting:
                    break
            self.card.cause(RXT0)
            await trio.lowlevel.checkpoint()

    async def _deliver(self, data: bytearray) -> None:
        """Put a frame into as many buffers as it takes. Raises DmaFault."""
        card, ring, statistics = self.card, self.ring, self.card.statistics[0]
        length, head = len(data), bytes(data[:6])
        statistics.count(TPR)
        statistics.count_octets(TORL, length + FCS)
        if length + FCS > (MAX_LONG if card.rctl.long_packets else MAX_STANDARD):
            statistics.count(ROC)
            return
        looked, errors = check(bytes(data), card.rxcsum.value)
        status, special = DD | looked | (self._match(head) or 0), 0
        crc = b"" if card.rctl.strip_crc else zlib.crc32(data).to_bytes(FCS, "little")
        if card.ctrl.vlan_mode and int.from_bytes(data[12:14], "big") == card.vet.value:
            status, special = status | VP, int.from_bytes(data[14:16], "big")
            del data[12:16]
        data += crc
        size = 32768 >> max(card.rctl.buffer_size, 1) if card.rctl.big_buffers else 2048 >> card.rctl.buffer_size
        for start in range(0, len(data), size):
            await self._wait_buffer()
            piece, end = data[start : start + size], EOP if start + size >= len(data) else 0
            descriptor = ring.at_head
            address = int.from_bytes(await card.dma.read(descriptor, 8), "little")
            if address:  # the driver gets back a descriptor that has none, and nothing else
                await card.dma.write(address, piece)
            write_back = _WRITE_BACK.pack(len(piece), 0, status | end, errors if end else 0, special)
            await card.dma.write(descriptor + 8, write_back)
            ring.advance()
        statistics.received(head, length)
        few = ring.left <= ring.count >> card.rctl.threshold + 1
        if few and not self._few_told:
            card.cause(RXDMT0)
        self._few_told = few

    async def _wait_buffer(self) -> None:
        """Wait until there is a descriptor of the driver's. Raises DmaFault."""
        waited = False
        while not self.card.rctl.enable or not self.ring.left:
            if not waited:
                waited = True
                self.card.statistics[0].count(RNBC)
                self.card.cause(RXT0)
            await self.ring.wait_kick()


def check(data: bytes, rxcsum: int) -> tuple[int, int]:
    """Status and errors of a frame's checksums (§3.2.9), of IPv4; of others nothing is said."""
    ethertype, network, protocol, transport = find_headers(data[:HEAD])
    if not rxcsum & (IPOFL | TUOFL) or ethertype != IPV4 or transport == network:
        return IXSM, 0
    status = errors = 0
    if rxcsum & IPOFL:
        status |= IPCS
        errors |= IPE if ones_complement_sum(data[network:transport]) % 0xFFFF else 0
    end = network + int.from_bytes(data[network + 2 : network + 4], "big")
    has_one = protocol == TCP or (protocol == UDP and any(data[transport + UDP_CHECK : transport + UDP_CHECK + 2]))
    if rxcsum & TUOFL and has_one and transport + UDP_CHECK + 2 <= end <= len(data):
        total = ones_complement_sum(data[transport:end]) + ones_complement_sum(data[network + 12 : network + 20])
        status |= TCPCS
        errors |= TCPE if (total + protocol + end - transport) % 0xFFFF else 0
    return status or IXSM, errors
