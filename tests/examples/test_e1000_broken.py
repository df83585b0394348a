"""examples/pci/e1000.py in front of a driver as none should be: rings and packets that cannot be."""

import logging
import random
import struct
from collections.abc import Callable

import pytest
import trio
from support.e1000_driver import (
    COUNT,
    CTRL,
    CTRL_RST,
    EOP,
    FRAME,
    IFCS,
    RCTL,
    RCTL_EN,
    RDBAL,
    RDH,
    RDLEN,
    RDT,
    RS,
    RX_RING,
    TCTL,
    TDBAL,
    TDH,
    TDLEN,
    TDT,
    TO_CARD,
    TSCTFC,
    TSE,
    TX_BUFFERS,
    TX_RING,
    E1000Driver,
    context,
    data_descriptor,
    driving_card,
    legacy,
)  # fmt: skip
from support.e1000_packets import SEGMENTED, show_segmented
from support.in_process_driver import RAM_SIZE
from support.packets import Packet


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
