"""Driver's side of an 82540EM in this process: rings in RAM, descriptors of all kinds, frames out of both ends."""

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from pci.e1000 import E1000
from support.in_process_driver import InProcessDriver, driving

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.backends.net.port import NetPort

MAC, PEER = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")

FRAME = PEER + MAC + b"\x88\xb5" + bytes(range(100))
TO_CARD = MAC + PEER + b"\x88\xb5" + bytes(range(100))

CTRL, STATUS, EECD, EERD, MDIC, VET = 0x0, 0x8, 0x10, 0x14, 0x20, 0x38
ICR, ITR, ICS, IMS, IMC = 0xC0, 0xC4, 0xC8, 0xD0, 0xD8
RCTL, TCTL = 0x100, 0x400
RDBAL, RDLEN, RDH, RDT = 0x2800, 0x2808, 0x2810, 0x2818
TDBAL, TDLEN, TDH, TDT = 0x3800, 0x3808, 0x3810, 0x3818
MTA, RAL, RAH, VFTA = 0x5200, 0x5400, 0x5404, 0x5600
RXCSUM = 0x5000
GPRC, GPTC, BPTC, MPTC, PTC127, GOTCL, MPRC, RNBC, ROC, TSCTC, TSCTFC = (
    0x4074, 0x4080, 0x40F4, 0x40F0, 0x40DC, 0x4090, 0x407C, 0x40A0, 0x40AC, 0x40F8, 0x40FC,
)  # fmt: skip
RCTL_EN, RCTL_UPE, RCTL_MPE, RCTL_LPE, RCTL_BAM, RCTL_VFE, RCTL_SECRC = (1 << bit for bit in (1, 3, 4, 5, 15, 18, 26))
CTRL_SLU, CTRL_RST, CTRL_VME = 1 << 6, 1 << 26, 1 << 30
TXDW, TXQE, LSC, RXDMT0, RXT0 = 0x01, 0x02, 0x04, 0x10, 0x80

RX_RING, TX_RING, RX_BUFFERS, TX_BUFFERS = 0x1000, 0x2000, 0x10000, 0x80000
COUNT = 16
"""Descriptors of each ring."""
BUFFER = 2048
EOP, IFCS, IC, RS, DEXT, VLE, TSE = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40, 0x04


def legacy(
    address: int, length: int, command: int = EOP | IFCS | RS, *, css: int = 0, cso: int = 0, tag: int = 0
) -> bytes:
    return struct.pack("<QHBBBBH", address, length, cso, command, 0, css, tag)


def context(
    ip: tuple[int, int, int],
    transport: tuple[int, int, int],
    command: int,
    *,
    payload: int = 0,
    header: int = 0,
    mss: int = 0,
) -> bytes:
    return struct.pack("<BBHBBHIBBH", *ip, *transport, payload | (command | DEXT) << 24, 0, header, mss)


def data_descriptor(
    address: int, length: int, command: int = EOP | IFCS | RS, *, options: int = 0, tag: int = 0
) -> bytes:
    return struct.pack("<QIBBH", address, length | 1 << 20 | (command | DEXT) << 24, 0, options, tag)


class E1000Driver:
    """Rings of `COUNT` descriptors; all receive buffers but one are the card's."""

    def __init__(self, driver: InProcessDriver, port: NetPort) -> None:
        self.pci, self.port = driver, port
        self.read, self.write, self.put, self.get = driver.read, driver.write, driver.put, driver.get
        self.tail = self.next = self._taken = 0

    @property
    def card(self) -> E1000:
        card = self.pci.function.device
        assert isinstance(card, E1000)
        return card

    def bring_up(self, rctl: int = RCTL_EN | RCTL_BAM) -> None:
        self.write(CTRL, CTRL_SLU)
        for number in range(COUNT):
            self.put(RX_RING + 16 * number, struct.pack("<QQ", RX_BUFFERS + BUFFER * number, 0))
        for base, ring in ((RDBAL, RX_RING), (TDBAL, TX_RING)):
            self.write(base, ring, 8)
            self.write(base + 8, 16 * COUNT)
            self.write(base + 0x10, 0)
            self.write(base + 0x18, 0)
        self.write(RDT, COUNT - 1)
        self.write(RCTL, rctl)
        self.write(TCTL, 0x0A)
        self.tail = self.next = 0

    async def show(self, *descriptors: bytes) -> list[int]:
        """Have these descriptors done; returns the status of each."""
        places = [(self.tail + number) % COUNT for number in range(len(descriptors))]
        for place, each in zip(places, descriptors, strict=True):
            self.put(TX_RING + 16 * place, each)
        self.tail = (self.tail + len(descriptors)) % COUNT
        self.write(TDT, self.tail)
        await self.pci.settle()
        return [self.get(TX_RING + 16 * place + 12, 1)[0] for place in places]

    async def sent(self) -> Frame:
        """The next frame that came out at the other end."""
        self._taken += 1
        with trio.fail_after(60):
            return await anext(self.port)

    async def drain(self) -> None:
        """Take all frames that came out."""
        counters = self.port.counters
        while self._taken < counters.tx_packets - counters.tx_dropped:
            await self.sent()

    async def receive(self, *frames: bytes) -> None:
        """Frames of the network; all are where they belong afterwards."""
        for frame in frames:
            assert await self.port.send(frame)
        await self.pci.settle()

    def received(self, errors: int = 0) -> tuple[bytes, int, int] | None:
        """The next buffer, its status and its tag, with these errors; it is the card's again."""
        place = RX_RING + 16 * self.next
        address, length, _, status, found, tag = struct.unpack("<QHHBBH", self.get(place, 16))
        if not status & 1:
            return None
        assert found == errors
        self.put(place + 8, bytes(8))
        self.write(RDT, self.next)
        self.next = (self.next + 1) % COUNT
        return self.get(address, length), status, tag

    def buffers(self) -> Sequence[tuple[bytes, int, int]]:
        """All of them that were filled."""
        found = []
        while (each := self.received()) is not None:
            found.append(each)
        return found


@asynccontextmanager
async def driving_card(does: Does = Does(0), *, rctl: int = RCTL_EN | RCTL_BAM) -> AsyncIterator[E1000Driver]:  # noqa: B008
    """A card whose driver has set up everything, with a `NetPort` at the other end of its cable."""
    port = NetPort(does=does)
    async with driving(E1000(netdev=port, mac=MAC.hex(":"))) as pci:
        driver = E1000Driver(pci, port)
        driver.bring_up(rctl)
        await pci.settle()
        yield driver
