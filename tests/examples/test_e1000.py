"""examples/pci/e1000.py by its registers and descriptors: what Linux' driver does, and what none should."""

import logging
import random
import struct
import zlib
from collections.abc import Callable

import pytest
import trio
from pci import e1000
from support.e1000_driver import (
    COUNT,
    CTRL,
    CTRL_RST,
    CTRL_SLU,
    CTRL_VME,
    EECD,
    EERD,
    EOP,
    IC,
    ICR,
    ICS,
    IFCS,
    IMC,
    IMS,
    ITR,
    LSC,
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
    RDBAL,
    RDH,
    RDLEN,
    RDT,
    RS,
    RX_BUFFERS,
    RX_RING,
    RXDMT0,
    RXT0,
    STATUS,
    TCTL,
    TDBAL,
    TDH,
    TDLEN,
    TDT,
    TSE,
    TX_BUFFERS,
    TX_RING,
    TXDW,
    TXQE,
    VFTA,
    VLE,
    E1000Driver,
    context,
    data_descriptor,
    driving_card,
    legacy,
)  # fmt: skip
from support.in_process_driver import RAM_SIZE
from support.packets import TCP, UDP, Packet

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.netdev import ALL

FRAME = PEER + MAC + b"\x88\xb5" + bytes(range(100))
TO_CARD = MAC + PEER + b"\x88\xb5" + bytes(range(100))
GPRC, GPTC, BPTC, MPTC, PTC127, GOTCL, MPRC, RNBC, ROC, TSCTC, TSCTFC = (
    0x4074, 0x4080, 0x40F4, 0x40F0, 0x40DC, 0x4090, 0x407C, 0x40A0, 0x40AC, 0x40F8, 0x40FC,
)  # fmt: skip


# ---- EEPROM, PHY, interrupts ---------------------------------------------------------------------------------------


def over_wires(driver: E1000Driver, address: int) -> int:
    """A word of the EEPROM, as a driver reads it bit by bit."""
    driver.write(EECD, 0x42)
    for bit in f"0110{address:06b}":  # a zero before the start bit is none
        level = 0x42 | 4 * int(bit)
        for wires in (level, level | 1, level):
            driver.write(EECD, wires)
    assert not driver.read(EECD) & 8, "a zero comes before the word"
    word = 0
    for _ in range(16):
        driver.write(EECD, 0x43)
        word = word << 1 | driver.read(EECD) >> 3 & 1
        driver.write(EECD, 0x42)
    driver.write(EECD, 0x40)
    return word


async def test_eeprom() -> None:
    async with driving_card() as driver:
        driver.write(EECD, 0x40)
        assert driver.read(EECD) & 0x1C0 == 0x1C0
        words = [over_wires(driver, address) for address in range(64)]
        assert sum(words) & 0xFFFF == 0xBABA
        assert struct.pack("<3H", *words[:3]) == MAC
        assert (words[0x0D], words[0x0E]) == (0x100E, 0x8086)
        for address, word in enumerate(words):
            driver.write(EERD, address << 8 | 1)
            assert driver.read(EERD) == word << 16 | address << 8 | 0x11 & ~1
        assert driver.read(RAL) == int.from_bytes(MAC[:4], "little")
        assert driver.read(RAH) == 1 << 31 | int.from_bytes(MAC[4:], "little")


async def test_phy_and_link() -> None:
    async with driving_card() as driver:

        def phy(number: int, value: int | None = None, address: int = 1) -> int:
            command = 2 << 26 if value is None else 1 << 26 | value
            driver.write(MDIC, command | address << 21 | number << 16)
            assert driver.read(MDIC) >> 28 & 1, "done"
            return driver.read(MDIC)

        assert (phy(2) & 0xFFFF, phy(3) & 0xFFFF) == (0x0141, 0x0C20)
        assert phy(2, address=2) >> 30, "no such PHY"
        phy(4, 0x1234)
        phy(2, 0x1234)
        assert (phy(4) & 0xFFFF, phy(2) & 0xFFFF) == (0x1234, 0x0141)
        phy(0, 0x9140)
        assert (phy(0) & 0xFFFF, phy(4) & 0xFFFF) == (0x1140, 0x0DE1)
        assert phy(1) & 0x24 == 0x24
        assert driver.read(STATUS) & 3 == 3
        driver.read(ICR)
        driver.port.set_link(False)
        await driver.pci.settle()
        assert driver.read(ICR) == LSC
        assert phy(1) & 0x24 == 0
        assert driver.read(STATUS) & 3 == 1
        assert await driver.show(legacy(TX_BUFFERS, 100)) == [1]
        assert driver.card.nic.drops_from_guest.by_reason == {Drop.LINK_DOWN: 1}
        driver.port.set_link(True)
        await driver.pci.settle()
        assert driver.read(ICR) == TXDW | TXQE | LSC
        driver.card.nic.set_link(False)
        driver.card.nic.set_link(True)
        assert driver.read(ICR) == LSC
        assert driver.read(STATUS) & 3 == 3


async def test_an_interrupt_is_a_cause_that_is_wanted() -> None:
    async with driving_card() as driver:
        driver.read(ICR)
        driver.write(ICS, 0x84)
        assert not driver.pci.interrupted
        driver.write(IMS, 0x80)
        assert driver.pci.interrupted
        driver.write(IMC, 0x80)
        assert not driver.pci.interrupted
        assert driver.read(IMS) == 0
        driver.write(IMS, 0x84)
        assert driver.read(ICR) == 0x84, "a read clears them"
        assert not driver.pci.interrupted
        driver.write(ICS, 0x84)
        driver.write(ICR, 0x80)
        assert driver.pci.interrupted
        driver.write(ICR, 0x04)
        assert not driver.pci.interrupted


async def test_interrupts_are_as_far_apart_as_itr_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    over = trio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await over.wait()

    monkeypatch.setattr(e1000, "sleep_briefly", sleep)
    async with driving_card() as driver:
        driver.read(ICR)
        driver.write(IMS, 0xFF)
        driver.write(ITR, 1000)
        driver.write(ICS, RXT0)
        await driver.pci.settle()
        assert driver.pci.interrupted
        driver.read(ICR)
        driver.write(ICS, RXT0)
        await driver.pci.settle()
        assert not driver.pci.interrupted, "not yet"
        over.set()
        await driver.pci.settle()
        assert driver.pci.interrupted
        assert slept == [pytest.approx(256e-6)] * 2


async def test_ports_lead_to_all_registers() -> None:
    async with driving_card() as driver:
        write, read = driver.pci.function.region_write, driver.pci.function.region_read
        write(2, 0, TDBAL.to_bytes(4, "little"))
        assert read(2, 4, 4) == TX_RING.to_bytes(4, "little")
        write(2, 0, CTRL.to_bytes(4, "little"))
        write(2, 4, CTRL_RST.to_bytes(4, "little"))
        assert driver.read(TDLEN) == driver.read(RCTL) == 0
        assert driver.read(CTRL) & CTRL_RST == 0
        assert driver.read(RAL) == int.from_bytes(MAC[:4], "little")
        driver.bring_up()
        await driver.pci.settle()
        driver.put(TX_BUFFERS, FRAME)
        assert await driver.show(legacy(TX_BUFFERS, len(FRAME))) == [1]


# ---- transmission --------------------------------------------------------------------------------------------------


async def test_a_frame_is_sent_from_several_buffers() -> None:
    async with driving_card() as driver:
        driver.read(ICR)
        driver.put(TX_BUFFERS, FRAME)
        done = await driver.show(
            legacy(TX_BUFFERS, 20, IFCS), legacy(0, 50, IFCS | RS), legacy(TX_BUFFERS + 20, len(FRAME) - 20)
        )
        assert done == [0, 1, 1]
        assert (await driver.sent()).tobytes() == FRAME
        assert (driver.read(TDH), driver.read(ICR)) == (3, TXDW | TXQE)
        driver.put(TX_BUFFERS, b"\xff" * 6 + FRAME[6:])
        await driver.show(*[legacy(TX_BUFFERS, 60)] * (COUNT - 3), legacy(TX_BUFFERS, 60))
        assert driver.read(TDH) == 1, "around the end of the ring"
        sent = [(await driver.sent()).length for _ in range(COUNT - 2)]
        assert sent == [60] * (COUNT - 2)
        assert [driver.read(each) for each in (GPTC, BPTC, MPTC, PTC127)] == [COUNT - 1, COUNT - 2, 0, 1]
        assert driver.read(GOTCL, 8) == len(FRAME) + 4 + 64 * (COUNT - 2)
        assert driver.read(GPTC) == driver.read(GOTCL) == 0, "a read clears them"


async def test_short_frames_are_padded_and_those_with_a_check_sequence_lose_it() -> None:
    async with driving_card() as driver:
        driver.put(TX_BUFFERS, FRAME)
        await driver.show(legacy(TX_BUFFERS, 20))
        assert (await driver.sent()).tobytes() == FRAME[:20] + bytes(40)
        await driver.show(legacy(TX_BUFFERS, len(FRAME), EOP | RS))
        assert (await driver.sent()).tobytes() == FRAME[:-4]
        driver.write(TCTL, 2)
        await driver.show(legacy(TX_BUFFERS, 20))
        assert (await driver.sent()).tobytes() == FRAME[:20]


PACKETS = [
    Packet(b"x" * 333),
    Packet(b"y" * 100, protocol=UDP),
    Packet(b"z" * 1001, version=6),
    Packet(b"z" * 70, version=6, protocol=UDP),
    Packet(b"o" * 70, options=b"\1" * 8),
]


def checksum_context(packet: Packet, **more: int) -> bytes:
    """As Linux' driver makes it."""
    command = (1 if packet.protocol == TCP else 0) | (2 if packet.version == 4 else 0)
    network, transport = packet.network, packet.transport
    at = transport + (16 if packet.protocol == TCP else 6)
    ip = (network, network + 10, transport - 1) if packet.version == 4 else (network, network + 10, 0)
    return context(ip, (transport, at, 0), command | more.pop("command", 0), **more)


@pytest.mark.parametrize("packet", PACKETS, ids=range(len(PACKETS)))
async def test_checksums(packet: Packet) -> None:
    async with driving_card() as driver:
        data = bytearray(packet.build(partial=True))
        if packet.version == 4:
            data[24:26] = bytes(2)
        driver.put(TX_BUFFERS, bytes(data))
        options = 3 if packet.version == 4 else 2
        done = await driver.show(
            checksum_context(packet),
            data_descriptor(TX_BUFFERS, 40, IFCS, options=options),
            data_descriptor(TX_BUFFERS + 40, len(data) - 40),
        )
        assert done == [0, 0, 1]
        assert (await driver.sent()).tobytes() == packet.build(partial=False)


async def test_checksum_of_a_legacy_descriptor_and_one_with_an_end() -> None:
    packet = PACKETS[0]
    async with driving_card() as driver:
        data = packet.build(partial=True)
        driver.put(TX_BUFFERS, data)
        await driver.show(
            legacy(TX_BUFFERS, len(data), EOP | IFCS | IC | RS, css=packet.transport, cso=packet.transport + 16)
        )
        assert (await driver.sent()).tobytes() == packet.build(partial=False)
        # A trailer that does not belong to the packet.
        driver.put(TX_BUFFERS, data + b"trailer")
        end = len(data) - 1
        made = context((0, 0, 0), (packet.transport, packet.transport + 16, end), 0)
        await driver.show(made, data_descriptor(TX_BUFFERS, len(data) + 7, options=2))
        assert (await driver.sent()).tobytes() == packet.build(partial=False) + b"trailer"
        for css, cso in ((34, 0xFF), (0xFF, 0x10), (0, 0), (200, 20)):
            await driver.show(legacy(TX_BUFFERS, 60, EOP | IFCS | IC | RS, css=css, cso=cso))
            assert (await driver.sent()).length == 60, "no room for it: none is stored"


SEGMENTED = [
    Packet(bytes(range(256)) * 12, identification=0xFFFF, seq=0xFFFF_FFF0, flags=0x19),
    Packet(bytes(range(256)) * 8, version=6, flags=0x18, tcp_options=b"\1" * 12),
    Packet(bytes(range(256)) * 10, options=b"\1" * 4),
    Packet(bytes(range(256)) * 10, protocol=UDP),
    Packet(bytes(range(256)) * 10, version=6, protocol=UDP),
]


def prototype(packet: Packet) -> bytes:
    """The packet as a driver shows it to be cut: nothing in its headers depends on its length."""
    data = bytearray(packet.build(partial=True))
    if packet.version == 4:
        data[16:18] = data[24:26] = bytes(2)
    else:
        data[18:20] = bytes(2)
    at = packet.transport + (16 if packet.protocol == TCP else 6)
    total = int.from_bytes(data[at : at + 2], "big") - (len(data) - packet.transport)
    data[at : at + 2] = (total % 0xFFFF).to_bytes(2, "big")
    if packet.protocol == UDP:
        data[packet.transport + 4 : packet.transport + 6] = bytes(2)
    return bytes(data)


async def show_segmented(
    driver: E1000Driver, packet: Packet, mss: int, *, header: int | None = None, vlan: int = 0
) -> list[int]:
    data = prototype(packet)
    driver.put(TX_BUFFERS, data)
    headers = len(data) - len(packet.payload) if header is None else header
    made = checksum_context(packet, command=TSE, payload=len(packet.payload), header=headers, mss=mss)
    command = TSE | (VLE if vlan else 0)
    options = 3 if packet.version == 4 else 2
    split = len(data) - len(packet.payload)
    return await driver.show(
        made,
        data_descriptor(TX_BUFFERS, split, command, options=options, tag=vlan),
        data_descriptor(TX_BUFFERS + split, len(packet.payload), TSE | EOP | IFCS | RS),
    )


@pytest.mark.parametrize("packet", SEGMENTED, ids=range(len(SEGMENTED)))
async def test_segmentation(packet: Packet) -> None:
    async with driving_card() as driver:
        assert await show_segmented(driver, packet, 700) == [0, 0, 1]
        for expected in packet.cut(700):
            assert (await driver.sent()).tobytes() == expected.build(partial=False)
        assert (driver.read(TSCTC), driver.read(TSCTFC)) == (1, 0)
    async with driving_card(ALL) as driver:
        await show_segmented(driver, packet, 700)
        whole = await driver.sent()
        assert whole.tobytes() == packet.build(partial=True)
        assert whole.offload is not None
        assert (whole.offload.gso_size, whole.offload.csum_start) == (700, packet.transport)


async def test_segments_have_the_tag_that_the_card_puts_in() -> None:
    packet = SEGMENTED[0]
    tagged = Packet(packet.payload, tags=((0x8100, 0x2007),), identification=0xFFFF, seq=0xFFFF_FFF0, flags=0x19)
    async with driving_card() as driver:
        driver.write(CTRL, CTRL_SLU | CTRL_VME)
        await show_segmented(driver, packet, 1000, vlan=0x2007)
        for expected in tagged.cut(1000):
            assert (await driver.sent()).tobytes() == expected.build(partial=False)
        driver.put(TX_BUFFERS, FRAME)
        await driver.show(legacy(TX_BUFFERS, len(FRAME), EOP | IFCS | VLE | RS, tag=7))
        assert (await driver.sent()).tobytes() == FRAME[:12] + b"\x81\0\0\7" + FRAME[12:]
        driver.write(CTRL, CTRL_SLU)
        await driver.show(legacy(TX_BUFFERS, len(FRAME), EOP | IFCS | VLE | RS, tag=7))
        assert (await driver.sent()).tobytes() == FRAME


# ---- reception -----------------------------------------------------------------------------------------------------


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


# ---- what no driver should do ----------------------------------------------------------------------------------------


async def alive(driver: E1000Driver) -> None:
    """After a reset all is well."""
    driver.write(CTRL, CTRL_RST)
    await driver.pci.settle()
    await driver.drain()
    driver.bring_up()
    driver.put(TX_BUFFERS, FRAME)
    await driver.show(legacy(TX_BUFFERS, len(FRAME)))
    assert (await driver.sent()).tobytes() == FRAME
    await driver.receive(TO_CARD)
    assert driver.buffers()[0][0][:-4] == TO_CARD


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda driver: driver.write(TDBAL, RAM_SIZE), "the transmit ring stands still: DMA read"),
        (lambda driver: driver.write(TDBAL, 0xFEBC0000, 8), "the transmit ring stands still: DMA read"),
        (lambda driver: driver.write(TDLEN, 0), "the transmit ring stands still: head 0x0, tail 0x1 in a ring of 0x0"),
        (lambda driver: driver.write(TDH, 0x4000), "head 0x4000, tail 0x1 in a ring of 0x10"),
        (lambda driver: driver.write(RDBAL, RAM_SIZE), "a frame for the driver is dropped: DMA read"),
        (
            lambda driver: driver.write(RDLEN, 128),
            "a frame for the driver is dropped: head 0x0, tail 0xf in a ring of 0x8",
        ),
        (lambda driver: driver.write(RDH, 0xFFFF), "a frame for the driver is dropped: head 0xffff"),
        (
            lambda driver: driver.put(RX_RING, struct.pack("<QQ", 1 << 63, 0)),
            "a frame for the driver is dropped: DMA write",
        ),
    ],
)
async def test_rings_that_cannot_be(
    break_it: Callable[[E1000Driver], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with driving_card() as driver:
        break_it(driver)
        driver.put(TX_RING, legacy(TX_BUFFERS, 60) * COUNT)
        for number in range(5):
            driver.write(TDT, number + 1)
            await driver.receive(TO_CARD)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == 1, "once"
        assert words in said[0]
        await alive(driver)


async def test_packets_that_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    packet = SEGMENTED[0]
    async with driving_card() as driver:
        # Of no length, of 64 KiB, of 16 KiB that is nowhere, without an end and too long, with an end.
        for descriptor in (
            legacy(TX_BUFFERS, 0), legacy(TX_BUFFERS, 0xFFFF), legacy(1 << 60, 16384), legacy(TX_BUFFERS, 3),
            data_descriptor(TX_BUFFERS, 0xFFFFF), legacy(TX_BUFFERS, 16, EOP | RS),
        ):  # fmt: skip
            assert await driver.show(descriptor) == [1]
        for _ in range(10):
            assert await driver.show(*[legacy(TX_BUFFERS, 0xFFFF, RS)] * (COUNT - 1)) == [1] * (COUNT - 1)
        assert len(driver.card.transmitter.pieces) <= 1
        assert await driver.show(legacy(TX_BUFFERS, 60)) == [1]
        assert driver.port.counters.tx_packets == 0
        # Segments of nothing, of a byte, headers that lie, no TCP at all.
        await show_segmented(driver, packet, 0)
        await show_segmented(driver, packet, 1)
        assert await show_segmented(driver, Packet(b"x" * 100), 0xFFFF, header=0xFF) == [0, 0, 1]
        assert (await driver.sent()).tobytes() == Packet(b"x" * 100).build(partial=False), "it is a hint"
        driver.put(TX_BUFFERS, FRAME)
        for ip, transport in (
            ((0, 0, 0), (0, 0, 0)),
            ((255, 255, 65535), (255, 255, 65535)),
            ((14, 24, 33), (34, 50, 1)),
        ):
            await driver.show(
                context(ip, transport, TSE | 3, mss=64, header=54),
                data_descriptor(TX_BUFFERS, 100, TSE | EOP | RS, options=3),
            )
            await driver.show(context(ip, transport, 3), data_descriptor(TX_BUFFERS, 100, EOP | IFCS | RS, options=3))
            assert (await driver.sent()).length == 100
        assert driver.read(TSCTFC) == 5
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == 3, said
        await alive(driver)


async def test_a_driver_that_changes_the_ring_while_it_is_worked_on() -> None:
    dice = random.Random(5)
    draw = dice.randrange
    async with driving_card() as driver:
        for _ in range(300):
            for _ in range(5):
                driver.put(TX_RING + 16 * draw(COUNT), dice.randbytes(16))
                driver.put(
                    TX_RING + 16 * draw(COUNT),
                    dice.choice((
                        legacy(TX_BUFFERS, draw(200), draw(256)),
                        context((14, 24, 33), (34, 50, 0), draw(256), mss=draw(100), header=54),
                        data_descriptor(TX_BUFFERS, draw(2000), draw(256), options=draw(4)),
                    )),
                )  # fmt: skip
                register = dice.choice((TDT, TDH, TDLEN, RDT, RDH, RDLEN, TDT, TDT, RDT, TCTL, RCTL))
                driver.write(register, dice.choice((draw(COUNT), draw(1 << 16), 16 * COUNT, RCTL_EN)))
            with trio.move_on_after(0):
                await driver.port.send(TO_CARD)
            await driver.pci.settle()
            await driver.drain()
        await alive(driver)
