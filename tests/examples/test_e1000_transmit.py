"""Transmission of examples/pci/e1000.py: descriptors of all kinds, checksums, segmentation, VLAN tags."""

import pytest
from support.e1000_driver import (
    BPTC,
    COUNT,
    CTRL,
    CTRL_SLU,
    CTRL_VME,
    EOP,
    FRAME,
    GOTCL,
    GPTC,
    IC,
    ICR,
    IFCS,
    MPTC,
    PTC127,
    RS,
    TCTL,
    TDH,
    TSCTC,
    TSCTFC,
    TX_BUFFERS,
    TXDW,
    TXQE,
    VLE,
    context,
    data_descriptor,
    driving_card,
    legacy,
)  # fmt: skip
from support.e1000_packets import PACKETS, SEGMENTED, checksum_context, show_segmented
from support.packets import Packet

from vfiouser_virtio.backends.net.netdev import ALL


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
