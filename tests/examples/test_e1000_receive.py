"""Reception of examples/pci/e1000.py: buffers, filters, VLAN tags, checksums, and frames that wait."""

import random
import struct
import zlib

import pytest
import trio
from support.e1000_driver import (
    COUNT,
    CTRL,
    CTRL_RST,
    CTRL_SLU,
    CTRL_VME,
    FRAME,
    GPRC,
    ICR,
    MAC,
    MDIC,
    MTA,
    PEER,
    RAH,
    RAL,
    RCTL,
    RCTL_BAM,
    RCTL_EN,
    RCTL_LPE,
    RCTL_MPE,
    RCTL_SECRC,
    RCTL_UPE,
    RCTL_VFE,
    RDH,
    RDT,
    RNBC,
    ROC,
    RX_BUFFERS,
    RX_RING,
    RXCSUM,
    RXDMT0,
    RXT0,
    TO_CARD,
    TX_BUFFERS,
    VFTA,
    driving_card,
    legacy,
)  # fmt: skip
from support.e1000_packets import PACKETS

from vfiouser_virtio.backends.net.drops import Drop


async def test_a_frame_is_received_with_its_check_sequence() -> None:
    async with driving_card() as driver:
        driver.read(ICR)
        await driver.receive(TO_CARD, b"\xff" * 6 + TO_CARD[6:], TO_CARD[:20])
        assert driver.read(ICR) == RXT0
        first, second, third = driver.buffers()
        assert first == (TO_CARD + zlib.crc32(TO_CARD).to_bytes(4, "little"), 0x07, 0)
        assert second[0][:6] == b"\xff" * 6
        assert third[0][:-4] == TO_CARD[:20] + bytes(40)
        assert driver.read(GPRC) == 3
        driver.write(RCTL, RCTL_EN | RCTL_SECRC)
        await driver.receive(TO_CARD)
        assert driver.received() == (TO_CARD, 0x07, 0)


@pytest.mark.parametrize(
    ("bits", "size"),
    [
        (0x00000, 2048),
        (0x10000, 1024),
        (0x20000, 512),
        (0x30000, 256),
        (0x2010000, 16384),
        (0x2020000, 8192),
        (0x2030000, 4096),
    ],
)
async def test_a_long_frame_lies_in_several_buffers(bits: int, size: int) -> None:
    data = MAC + PEER + b"\x88\xb5" + random.Random(1).randbytes(3000)
    async with driving_card(rctl=RCTL_EN | RCTL_LPE | RCTL_SECRC | bits) as driver:
        for number in range(COUNT):  # far enough from one another
            driver.put(RX_RING + 16 * number, struct.pack("<QQ", RX_BUFFERS + 16384 * number, 0))
        await driver.receive(data)
        buffers = driver.buffers()
        assert b"".join(each for each, _, _ in buffers) == data
        assert [len(each) for each, _, _ in buffers[:-1]] == [size] * (len(data) // size)
        assert [status & 2 for _, status, _ in buffers] == [0] * (len(buffers) - 1) + [2]


async def test_long_frames_are_for_drivers_that_want_them() -> None:
    async with driving_card() as driver:
        await driver.receive(MAC + PEER + bytes(1507), MAC + PEER + bytes(1506))
        assert [len(each) for each, _, _ in driver.buffers()] == [1522]
        assert driver.read(ROC) == 1
        driver.write(RCTL, RCTL_EN | RCTL_LPE)
        await driver.receive(MAC + PEER + bytes(16369), MAC + PEER + bytes(16368))
        assert sum(len(each) for each, _, _ in driver.buffers()) == 16384


async def test_filters() -> None:
    foreign, group = PEER + TO_CARD[6:], bytes.fromhex("01005e0102f3") + TO_CARD[6:]
    broadcast = b"\xff" * 6 + TO_CARD[6:]
    everything = (TO_CARD, foreign, group, broadcast)
    async with driving_card() as driver:

        async def passes(rctl: int, *frames: bytes) -> list[bytes]:
            driver.write(RCTL, RCTL_EN | RCTL_SECRC | rctl)
            await driver.receive(*frames)
            return [each for each, _, _ in driver.buffers()]

        assert await passes(0, *everything) == [TO_CARD]
        assert await passes(RCTL_BAM, *everything) == [TO_CARD, broadcast]
        assert await passes(RCTL_MPE, *everything) == [TO_CARD, group, broadcast]
        assert await passes(RCTL_UPE, *everything) == [TO_CARD, foreign]
        assert driver.card.nic.filtered == 3 + 2 + 1 + 2
        # Which bits of the last two bytes, 0x02 and 0xf3, choose one of 4096 (table 13-67).
        for offset, bits in enumerate((0xF30, 0xE60, 0xCC0, 0x302)):
            driver.write(MTA + 4 * (bits >> 5), 1 << (bits & 31))
            assert await passes(offset << 12, *everything) == [TO_CARD, group]
            driver.write(MTA + 4 * (bits >> 5), 0)
            assert await passes(offset << 12, group) == []
        driver.write(RAL + 8, int.from_bytes(PEER[:4], "little"))
        driver.write(RAH + 8, 1 << 31 | int.from_bytes(PEER[4:], "little"))
        assert await passes(0, *everything) == [TO_CARD, foreign]
        driver.write(RAH + 8, int.from_bytes(PEER[4:], "little"))
        assert await passes(0, *everything) == [TO_CARD]


async def test_vlan_tags() -> None:
    tagged = [MAC + PEER + b"\x81\0" + vlan.to_bytes(2, "big") + TO_CARD[12:] for vlan in (0x2007, 8)]
    async with driving_card() as driver:
        driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_VFE)
        await driver.receive(*tagged, TO_CARD)
        assert [each for each, _, _ in driver.buffers()] == [TO_CARD]
        driver.write(VFTA, 1 << 7)
        await driver.receive(*tagged)
        assert driver.buffers() == [(tagged[0], 0x07, 0)]
        driver.write(CTRL, CTRL_SLU | CTRL_VME)
        await driver.receive(*tagged, TO_CARD)
        assert driver.buffers() == [(TO_CARD, 0x0F, 0x2007), (TO_CARD, 0x07, 0)]
        driver.write(RCTL, RCTL_EN)
        await driver.receive(tagged[0])
        (found, _, _) = driver.buffers()[0]
        assert found == TO_CARD + zlib.crc32(tagged[0]).to_bytes(4, "little"), "that of the frame on the wire"


async def test_checksums_of_what_is_received() -> None:
    async with driving_card(rctl=RCTL_EN | RCTL_UPE | RCTL_SECRC) as driver:

        async def status(frame: bytes, errors: int = 0) -> int:
            await driver.receive(frame)
            found = driver.received(errors)
            assert found is not None
            return found[1] & 0x64

        tcp, udp = PACKETS[0].build(partial=False), PACKETS[1].build(partial=False)
        assert await status(tcp) == 0x04
        driver.write(RXCSUM, 0x300)
        for good in (tcp, udp, PACKETS[4].build(partial=False), tcp + bytes(10)):
            assert await status(good) == 0x60
        assert await status(tcp[:-1] + b"!", 0x20) == 0x60
        assert await status(tcp[:15] + b"\xff" + tcp[16:], 0x40) == 0x60
        assert await status(udp[:40] + bytes(2) + udp[42:]) == 0x40, "UDP has none"
        assert await status(tcp[:-1]) == 0x40, "the packet is not whole"
        for other in (PACKETS[2].build(partial=False), TO_CARD, tcp[:20] + b"\x20" + tcp[21:]):
            assert await status(other) == 0x04
        driver.write(RXCSUM, 0x200)
        assert await status(tcp) == 0x20


async def test_what_is_sent_comes_back_through_the_phy() -> None:
    async with driving_card(rctl=RCTL_EN | RCTL_BAM | RCTL_SECRC) as driver:
        frame = b"\xff" * 6 + FRAME[6:]
        driver.put(TX_BUFFERS, frame)
        driver.write(MDIC, 1 << 26 | 1 << 21 | 0x4140)
        assert await driver.show(legacy(TX_BUFFERS, len(frame))) == [1]
        assert driver.buffers() == [(frame, 0x07, 0)]
        assert driver.port.counters.tx_packets == 0
        driver.write(MDIC, 1 << 26 | 1 << 21 | 0x1140)
        await driver.show(legacy(TX_BUFFERS, len(frame)))
        assert (await driver.sent()).tobytes() == frame


async def test_frames_wait_for_buffers() -> None:
    async with driving_card() as driver:
        driver.read(ICR)
        await driver.receive(*[TO_CARD] * (COUNT - 1 + 4))
        assert driver.read(ICR) == RXT0 | RXDMT0
        assert driver.read(RDH) == driver.read(RDT) == COUNT - 1
        assert (driver.card.nic.waiting, driver.read(RNBC)) == (3, 1), "one is on its way"
        assert len(driver.buffers()) == COUNT - 1
        await driver.pci.settle()
        assert len(driver.buffers()) == 4
        assert driver.port.counters.rx_dropped == driver.card.nic.drops_to_guest.total == 0


async def test_a_full_fifo_holds_up_the_network_until_there_are_buffers() -> None:
    data = MAC + PEER + bytes(1486)
    async with driving_card() as driver, trio.open_nursery() as nursery:
        driver.write(RDT, 0)

        async def send() -> None:
            for _ in range(100):
                await driver.port.send(data)

        nursery.start_soon(send)
        await driver.pci.settle()
        assert driver.card.nic.waiting == (48 << 10) // 1498
        driver.write(RDT, COUNT - 1)
        received = 0
        with trio.fail_after(120):
            while received < 100:
                await driver.pci.settle()
                received += len(driver.buffers())


async def test_what_waits_is_gone_after_a_reset() -> None:
    async with driving_card() as driver:
        driver.write(RDT, 0)
        await driver.receive(*[TO_CARD] * 5)
        driver.write(CTRL, CTRL_RST)
        await driver.pci.settle()
        assert driver.card.nic.drops_to_guest.by_reason == {Drop.DRIVER_LEFT: 4}
        await driver.receive(TO_CARD)
        assert driver.card.nic.drops_to_guest[Drop.NO_DRIVER] == 1
        driver.bring_up()
        await driver.receive(TO_CARD)
        assert len(driver.buffers()) == 1
