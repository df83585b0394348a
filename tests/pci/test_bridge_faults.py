"""A device in a simulator that hangs, dies or lies: all-ones reads, a line in the log, and a server that goes on."""

import logging
import os
import random
import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from support.fake_simulator import Card, FakeSimulator, fake_simulator

from vfiouser_virtio import holds
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.guest.function import GuestFunction
from vfiouser_virtio.pci import bridge as bridge_module
from vfiouser_virtio.protocols.rtl_bridge import MAX_DMA, MAX_MESSAGE, REPLY, RtlMessage, RtlStatus
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.testing.own_pci import pci_function
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_user import connect

ONES = 0xFFFF_FFFF


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


async def works(card: GuestFunction, path: Path) -> None:
    """The device goes on with the next simulator."""
    async with fake_simulator(path) as simulator, trio.open_nursery() as nursery:

        async def answer() -> None:
            await simulator.answer(await simulator.expect(RtlMessage.READ), b"good")

        nursery.start_soon(answer)
        assert await card.bar[0].read32(0x40) == int.from_bytes(b"good", "little")


async def test_one_that_hangs(
    card: GuestFunction, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.01)
    async with fake_simulator(path) as simulator:
        assert await card.bar[0].read32(0x40) == ONES
        asked = await simulator.expect(RtlMessage.READ)
        monkeypatch.setattr(holds, "HOLD_TIMEOUT", 1e9)
        for _ in range(3):
            assert await card.bar[0].read32(0x44) == ONES, "it is not asked, and not waited for"
        await card.bar[0].write32(0x48, 7)
        written = await simulator.expect(RtlMessage.WRITE)
        [line] = warnings(caplog)
        hangs = "the simulator has not answered a read of 4 bytes at BAR0+0x40 for 2 s"
        assert line == f"card: {hangs}: until it answers, registers read as all-ones"
        await simulator.answer(asked, b"late")
        await simulator.answer(written)
        assert (await simulator.dma(RtlMessage.DMA_READ, 0, 1))[0] == RtlStatus.REFUSED  # until all of that has come
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await simulator.answer(await simulator.expect(RtlMessage.READ), b"good")

            nursery.start_soon(answer)
            assert await card.bar[0].read32(0x40) == int.from_bytes(b"good", "little")


async def test_one_that_takes_no_writes(
    card: GuestFunction, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.01)
    async with fake_simulator(path) as simulator:
        for value in range(600):
            await card.bar[0].write32(0x48, value)
        assert await card.bar[0].read32(0x40) == ONES
        for value in range(512):
            asked = await simulator.expect(RtlMessage.WRITE)
            assert asked.access[3] == value.to_bytes(4, "little")
            await simulator.answer(asked)
        assert (await simulator.dma(RtlMessage.DMA_READ, 0, 1))[0] == RtlStatus.REFUSED
        await card.bar[0].write32(0x48, 1)
        assert (await simulator.expect(RtlMessage.WRITE)).access[3] == b"\1\0\0\0"
    assert [each for each in warnings(caplog) if "lost" in each] == [
        "card: the simulator does not answer, and has much to do already: a write of BAR0+0x48 and others are lost"
    ]


async def test_one_that_dies_while_it_is_asked(
    card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery, fake_simulator(path) as simulator:

        async def die() -> None:
            await simulator.expect(RtlMessage.READ)
            await simulator.stream.aclose()

        nursery.start_soon(die)
        assert await card.bar[0].read32(0x40) == ONES
    [line] = warnings(caplog)
    gone = "the simulator is gone (it has closed its socket)"
    assert line == f"card: {gone}: registers read as all-ones until one connects to {path}"
    await works(card, path)


async def test_one_that_owes_an_answer_to_a_client_that_has_left(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next client comes at once, and gets the answer to its own question."""
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 1e9)
    function = PciDeviceFunction(Card(simulator=path), name="card")
    async with serve(function, path=tmp_path / "card.sock"), fake_simulator(path) as simulator:
        asked = []
        for _ in range(2):
            async with connect(tmp_path / "card.sock") as client, trio.open_nursery() as nursery:
                nursery.start_soon(client.region_read, PciRegion.BAR0, 0x40, 4)
                asked.append(await simulator.expect(RtlMessage.READ))
                nursery.cancel_scope.cancel()
        async with connect(tmp_path / "card.sock") as client, trio.open_nursery() as nursery:

            async def answer() -> None:
                asked.append(await simulator.expect(RtlMessage.READ))
                for each, data in zip(asked, (b"one.", b"two.", b"mine"), strict=True):
                    await simulator.answer(each, data)

            nursery.start_soon(answer)
            assert await client.region_read(PciRegion.BAR0, 0x40, 4) == b"mine"


async def test_one_that_refuses_a_register(card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with fake_simulator(path) as simulator, trio.open_nursery() as nursery:

        async def refuse() -> None:
            for _ in range(2):
                await simulator.answer(await simulator.expect(RtlMessage.READ), status=RtlStatus.REFUSED)

        nursery.start_soon(refuse)
        assert [await card.bar[0].read32(0x40) for _ in range(2)] == [ONES, ONES]
        assert warnings(caplog) == ["card: the simulator refuses a read of 4 bytes at BAR0+0x40, status 0x1"]


LIES = {
    "too long": (struct.pack("<IHHI4x", MAX_MESSAGE + 1, 2, 0, 0), f"a message of {MAX_MESSAGE + 1:#x} bytes"),
    "too short": (struct.pack("<IHHI4x", 3, 2, 0, 0), "a message of 0x3 bytes"),
    "kind": (struct.pack("<IHHI4x", 16, 99, 0, 0), "a message of kind 0x63"),
    "request of ours": (struct.pack("<IHHI4x", 16, RtlMessage.READ, 0, 0), "READ, which only a bridge asks for"),
    "second hello": (struct.pack("<IHHI4x", 16, RtlMessage.HELLO, 0, 0), "HELLO, which only a bridge asks for"),
    "reply to nothing": (
        struct.pack("<IHHI4x", 16, RtlMessage.READ | REPLY, 0, 7),
        "a reply to READ 0x7, which was not asked",
    ),
    "vector": (struct.pack("<IHHI4xII", 24, RtlMessage.INTERRUPT, 0, 0, 2, 2), "INTERRUPT 0x2, action 0x2"),
    "action": (struct.pack("<IHHI4xII", 24, RtlMessage.INTERRUPT, 0, 0, 0, 3), "INTERRUPT 0x0, action 0x3"),
    "interrupt cut": (struct.pack("<IHHI4xI", 20, RtlMessage.INTERRUPT, 0, 0, 0), "INTERRUPT with 0x4 bytes"),
    "dma cut": (struct.pack("<IHHI4x", 16, RtlMessage.DMA_READ, 0, 0), "DMA_READ with 0x0 bytes"),
    "dma of nothing": (struct.pack("<IHHI4xQI4x", 32, RtlMessage.DMA_READ, 0, 0, 0, 0), "DMA_READ of 0x0 bytes at 0x0"),
    "dma too long": (
        struct.pack("<IHHI4xQI4x", 32, RtlMessage.DMA_READ, 0, 0, 0, MAX_DMA + 1),
        "DMA_READ of 0x10001 bytes",
    ),
    "dma beyond": (
        struct.pack("<IHHI4xQI4x", 32, RtlMessage.DMA_READ, 0, 0, (1 << 64) - 1, 2),
        "DMA_READ of 0x2 bytes at",
    ),
    "dma without data": (struct.pack("<IHHI4xQI4x", 32, RtlMessage.DMA_WRITE, 0, 0, 0, 2), "DMA_WRITE with 0x10 bytes"),
}


async def test_one_that_lies(card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data, expected in LIES.values():
        caplog.clear()
        async with fake_simulator(path) as simulator:
            await simulator.stream.send_all(data)
            assert (await simulator.receive()).kind == RtlMessage.END
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                await simulator.receive()
        [line] = warnings(caplog)
        assert f"the simulator is gone (it sent {expected}" in line
    await works(card, path)


async def test_answers_that_lie(card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data, number, expected in ((b"\1\2", 0, "0x2 bytes in reply to a read"), (b"good", 1, "a reply to READ")):
        caplog.clear()
        async with trio.open_nursery() as nursery, fake_simulator(path) as simulator:
            ended = trio.Event()

            async def lie(
                simulator: FakeSimulator = simulator,
                data: bytes = data,
                number: int = number,
                ended: trio.Event = ended,
            ) -> None:
                asked = await simulator.expect(RtlMessage.READ)
                await simulator.send(RtlMessage.READ | REPLY, asked.number + number, data)
                await ended.wait()

            nursery.start_soon(lie)
            assert await card.bar[0].read32(0x40) == ONES
            ended.set()
        assert expected in warnings(caplog)[0]
    await works(card, path)


@pytest.mark.parametrize(("magic", "version"), [(b"vfio-rtl", 2), (b"GET / HT", 1)])
async def test_one_of_another_version(
    magic: bytes, version: int, card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_simulator(path, greet=False) as simulator:
        assert (await simulator.hello(magic, version)).status == RtlStatus.FAILED
    await works(card, path)
    assert f"HELLO {magic!r} of version {version:#x}" in warnings(caplog)[0]


async def test_one_that_says_nothing(
    card: GuestFunction, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge_module, "HELLO_TIMEOUT_S", 0.01)
    async with fake_simulator(path, greet=False) as simulator:
        assert (await simulator.receive()).kind == RtlMessage.END
    monkeypatch.setattr(bridge_module, "HELLO_TIMEOUT_S", 10.0)
    await works(card, path)
    assert "it has not said HELLO for 0.01 s" in warnings(caplog)[0]


async def test_one_that_reads_no_replies(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is done for it: each of its requests of 32 bytes takes 64 KiB of our memory."""
    device, done = Card(simulator=path), 0

    async def count(address: int, length: int) -> bytes:
        nonlocal done
        done += 1
        return await read(address, length)

    read = device.dma.read
    monkeypatch.setattr(device.dma, "read", count)
    async with pci_function(device) as card:
        memory = card.memory.alloc(MAX_DMA)
        request = struct.pack("<IHHI4xQI4x", 32, RtlMessage.DMA_READ, 0, 0, memory.address, MAX_DMA)
        async with fake_simulator(path) as simulator:
            while _send_now(simulator, request * 512):
                await trio.testing.wait_all_tasks_blocked()
            assert await card.bar[0].read32(0x10) == 0x600D
            await trio.testing.wait_all_tasks_blocked(0.05)
            # 1 MiB is kept, and some is in the socket.
            assert 16 < done < 100
        await works(card, path)


def _send_now(simulator: FakeSimulator, data: bytes) -> int:
    with socket.socket(fileno=os.dup(simulator.stream.socket.fileno())) as sock:
        try:
            return sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0


async def test_nonsense(card: GuestFunction, path: Path) -> None:
    """Whatever bytes come: the device answers, and takes the next simulator."""
    chance = random.Random(13)
    for _ in range(60):
        async with fake_simulator(path) as simulator:
            try:
                for _ in range(chance.randrange(1, 8)):
                    kind = chance.choice(
                        [*RtlMessage, *(each | REPLY for each in RtlMessage), chance.randrange(1 << 16)]
                    )
                    body = chance.randbytes(chance.choice([0, 8, 16, 16, 20, 32]))
                    if chance.random() < 0.5:
                        body = struct.pack("<QI4x", chance.randrange(1 << 20), chance.randrange(1, 64)) + body
                    await simulator.send(kind, chance.randrange(4), body, chance.randrange(4))
                await simulator.stream.send_all(chance.randbytes(chance.randrange(40)))
            except trio.BrokenResourceError:
                pass
        assert await card.bar[0].read32(0x10) == 0x600D
    await works(card, path)


def test_paths_that_cannot_be(path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        Card(simulator=path / ("x" * 108))
    with pytest.raises(DeviceError, match="No such file or directory"):
        Card(simulator=path / "x")
    card = Card(simulator=path)
    with pytest.raises(DeviceError, match="another program listens there"):
        Card(simulator=path)
    card.close()
    assert not path.exists()
