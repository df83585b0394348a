"""Transmission of an 82540EM: from descriptors in memory to frames, with checksums and segmentation.

Facts: see e1000.py; descriptors (§3.3), segmentation (§3.5), checksums of it and of single packets (§3.5.9, §3.6).

::

    legacy   address │ length, CSO, CMD, STA, CSS, special        CMD: EOP IFCS IC RS DEXT VLE, the checksum's place
    context  IPCSS, IPCSO, IPCSE, TUCSS, TUCSO, TUCSE │ PAYLEN, DTYP 0, TUCMD, STA, HDRLEN, MSS
    data     address │ DTALEN, DTYP 1, DCMD, STA, POPTS, special  DCMD: EOP IFCS TSE RS DEXT VLE, POPTS: IXSM TXSM

Segments are not cut here: a netdev that takes them whole, such as a hub, gets them so, and else `Nic` does it.
"""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import trio
from pci.e1000_banks import FCS, TSCTC, TSCTFC

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.headers import ETH_HLEN, VLAN_HLEN
from vfiouser_virtio.backends.net.netdev import MAX_FRAME
from vfiouser_virtio.backends.net.segmentation import U16, UDP_HLEN, BadOffload, ones_complement_sum
from vfiouser_virtio.pci import DmaFault, Register, flag
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

if TYPE_CHECKING:
    from pci.e1000 import E1000

BATCH = 64
"""Descriptors that are taken at once; other devices have their turns in between."""
MIN_LENGTH, MAX_LENGTH = 60, 16288
"""Bytes that a packet is padded to, and that one may have which is not cut (§3.3.3)."""
TCP_HLEN = 20
EOP, IFCS, IC, TSE, RS, DEXT, VLE = 0x01, 0x02, 0x04, 0x04, 0x08, 0x20, 0x40
TU_TCP, TU_IPV4 = 0x01, 0x02
IXSM, TXSM = 0x01, 0x02
DONE = b"\1"
TXDW, TXQE = 0x01, 0x02
"""Causes of an interrupt: descriptors are written back, the ring is empty."""
_LEGACY = struct.Struct("<QHBBBBH")
_CONTEXT = struct.Struct("<BBHBBHIBBH")
_DATA = struct.Struct("<QIBBH")
_NEEDS_CSUM = int(HdrFlags.NEEDS_CSUM)


class TransmitControl(Register):
    enable = flag(1)
    pad_short = flag(3)


class Command(NamedTuple):
    """What a data or legacy descriptor says, beside its buffer."""

    command: int
    options: int
    special: int
    extended: bool
    checksum: tuple[int, int] = (0, 0)
    """CSS and CSO of a legacy one."""


class Transmitter:
    """The transmit ring of a card."""

    def __init__(self, card: "E1000") -> None:
        self.card, self.ring = card, card.rings[1]
        self.reset()

    def reset(self) -> None:
        """Power-on state."""
        self._context = bytes(_CONTEXT.size)
        self._first: Command | None = None
        self.pieces: list[bytes] = []
        self._length = 0

    async def run(self) -> None:
        """Send what the driver shows, until cancelled."""
        while True:
            await self.ring.wait_kick()
            try:
                while self.card.tctl.enable and await self._send_some():
                    await trio.lowlevel.checkpoint()
            except DmaFault as fault:
                self.card.log.once("transmit ring", "the transmit ring stands still: %s", fault)

    async def _send_some(self) -> bool:
        """Take some descriptors; whether there were any. Raises DmaFault."""
        ring, dma = self.ring, self.card.dma
        count = min(ring.left, ring.count - ring.head.value, BATCH)
        if not count:
            return False
        at_head = ring.at_head
        descriptors = await dma.read(at_head, 16 * count)
        frames: list[Frame] = []
        for start in range(0, 16 * count, 16):
            frame = await self._take(descriptors[start : start + 16])
            if frame is not None:
                frames.append(frame)
        await self._send(frames)
        for number in range(count):
            if descriptors[16 * number + 11] & RS:
                await dma.write(at_head + 16 * number + 12, DONE)
        ring.advance(count)
        self.card.cause(TXDW | (0 if ring.left else TXQE))
        return True

    async def _send(self, frames: Sequence[Frame]) -> None:
        statistics, nic = self.card.statistics[0], self.card.nic
        wrongs: list[BadOffload | None] = [None] * len(frames)
        if self.card.phy.loopback:
            for frame in frames:
                nic.put(frame)  # without room in the FIFO it is lost
        else:
            wrongs = await nic.send(frames)
        for frame, wrong in zip(frames, wrongs, strict=True):
            segmented = frame.offload is not None and frame.offload.gso_type
            if wrong is not None:
                self.card.log.once("offload", "a packet of the driver is dropped: %s", wrong)
            else:
                statistics.sent(frame.head(6), frame.length)
            if segmented:
                statistics.count(TSCTC if wrong is None else TSCTFC)

    async def _take(self, descriptor: bytes) -> Frame | None:
        """One descriptor; the frame that ends with it."""
        if descriptor[11] & DEXT:
            if not descriptor[10] >> 4:
                self._context = descriptor
                return None
            address, length, _, options, special = _DATA.unpack(descriptor)
            this = Command(descriptor[11], options, special, extended=True)
            length &= 0xFFFFF
        else:
            address, length, checksum_at, command, _, checksum_from, special = _LEGACY.unpack(descriptor)
            this = Command(command, 0, special, extended=False, checksum=(checksum_from, checksum_at))
        if self._first is None:
            self._first = this
        self._length += length
        if length and address and self._length <= MAX_FRAME:  # what is longer is dropped where it ends, if it does
            try:
                self.pieces.append(await self.card.dma.read(address, length))
            except DmaFault as fault:
                self.card.log.once("transmit buffer", "a packet of the driver is dropped: %s", fault)
                self._length = MAX_FRAME + 1
        if not this.command & EOP:
            return None
        first, data, length = self._first, bytearray().join(self.pieces), self._length
        self._first, self.pieces, self._length = None, [], 0
        return self._frame(data, length, first, this)

    def _frame(self, data: bytearray, length: int, first: Command, last: Command) -> Frame | None:
        """Frame of a packet with ``length`` bytes, whose descriptors are these; None where it cannot be."""
        segmented = first.extended and first.command & TSE
        if not segmented and not last.command & IFCS:
            del data[-FCS:]  # it has one already
        if length > (MAX_FRAME if segmented else MAX_LENGTH) or len(data) < ETH_HLEN:
            self.card.log.once("length", "a packet of the driver is dropped: it has %#x bytes", length)
            return None
        offload: Offload | None = None
        if segmented:
            offload = self._segmented(data)
        elif first.extended:
            offload = self._checksums(data, first.options)
        elif last.command & IC:
            offload = insert_checksum(data, last.checksum[0], 0, last.checksum[1])
        if self.card.tctl.pad_short and len(data) < MIN_LENGTH:
            data += bytes(MIN_LENGTH - len(data))
        tagging = first if segmented else last
        if tagging.command & VLE and self.card.ctrl.vlan_mode:
            data[12:12] = (self.card.vet.value << 16 | tagging.special).to_bytes(VLAN_HLEN, "big")
            if offload is not None:
                header = offload.hdr_len + VLAN_HLEN if segmented else 0
                offload = offload._replace(hdr_len=header, csum_start=offload.csum_start + VLAN_HLEN)
        return frame_of(data, offload)

    def _checksums(self, data: bytearray, options: int) -> Offload | None:
        """Checksums of a packet, as the context says."""
        ip_from, ip_at, ip_to, start, at, end, *_ = _CONTEXT.unpack(self._context)
        if options & IXSM:
            store_checksum(data, ip_from, ip_to, ip_at, zero=0)
        return insert_checksum(data, start, end, at) if options & TXSM else None

    def _segmented(self, data: bytearray) -> Offload:
        """Headers of a packet that is to be cut: the driver has left out of them all that depends on the length."""
        ip_from, ip_at, ip_to, start, at, _, rest, _, header, mss = _CONTEXT.unpack(self._context)
        command, length = rest >> 24, len(data)
        kind = GsoType.TCPV4 if command & TU_IPV4 else GsoType.TCPV6
        if command & TU_IPV4:
            put16(data, ip_from + 2, length - ip_from)
            store_checksum(data, ip_from, ip_to, ip_at, zero=0)
        else:
            put16(data, ip_from + 4, length - ip_from - 40)
        if not command & TU_TCP:
            kind = GsoType.UDP_L4
            put16(data, start + 4, length - start)
        if at + 2 <= length:  # the sum of the pseudo header, in which the length is missing
            put16(data, at, (U16.unpack_from(data, at)[0] + length - start - 1) % 0xFFFF + 1)
        header = min(max(header, start + (TCP_HLEN if command & TU_TCP else UDP_HLEN)), length)
        return Offload(_NEEDS_CSUM, int(kind), header, mss, start, max(at - start, 0))


def put16(data: bytearray, at: int, value: int) -> None:
    """Store a field of a header, where the packet has room for it."""
    if at + 2 <= len(data):
        U16.pack_into(data, at, value & 0xFFFF)


def store_checksum(data: bytearray, start: int, end: int, at: int, *, zero: int = 0xFFFF) -> None:
    """Store the checksum of the bytes from ``start`` to ``end`` (0: the last), if there are such, and room for it.

    ``zero`` is what stands for a checksum of zero.
    """
    if start < len(data):
        total = ones_complement_sum(data[start : end + 1 if end else None])
        put16(data, at, (0xFFFF - total % 0xFFFF) % 0xFFFF or zero)


def insert_checksum(data: bytearray, start: int, end: int, at: int) -> Offload | None:
    """Leave the checksum of a packet to whoever needs it; one that others do not know of is stored."""
    if ETH_HLEN <= start <= at and at + 2 <= len(data) and not end:
        return Offload(_NEEDS_CSUM, 0, 0, 0, start, at - start)
    store_checksum(data, start, end, at)
    return None
