"""Memory of a client behind libvfio-user: DMA_MAP, quiescing, resets."""

import errno
import struct

import pytest
import trio
from support.hosted_echo import HostedEcho
from support.library_client import (
    DISCONNECTED,
    PAGE,
    Connect,
    dma_map,
    dma_unmap,
    events,
    negotiate,
    read,
    set_irqs,
    until,
)

from vfiouser_virtio import holds
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import Command, PciIrq
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import Hold

# ---- memory ----------------------------------------------------------------------------------------------------------


async def test_memory_comes_and_goes(client: RawClient, device: HostedEcho, memfd: int) -> None:
    assert await dma_map(client, 0x10000, 4 * PAGE, memfd) == 0
    assert ("dma_map_alias", 0x10000, 4 * PAGE, True, True, PAGE) in device.calls
    assert device.memory(0x10000, 19) == b"the client's memory"
    assert await dma_unmap(client, 0x10000, 4 * PAGE) == 0
    assert device.calls[-1] == ("dma_unmap", 0x10000, 4 * PAGE)


async def test_the_same_map_twice_is_one(client: RawClient, device: HostedEcho, memfd: int) -> None:
    for _ in range(2):
        assert await dma_map(client, 0x10000, PAGE, memfd) == 0
    assert device.names().count("dma_map_alias") == 1
    assert await dma_unmap(client, 0x10000, PAGE) == 0
    assert device.names().count("dma_unmap") == 1


async def test_memory_that_is_refused_ends_the_connection(
    client: RawClient,
    device: HostedEcho,
    memfd: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    connect: Connect,
) -> None:
    """By unsealed-memory: the library has said yes already, and the client must not go on without its memory."""
    refusal = PeerError("DMA_MAP of 0x10000+0x1000: whoever has its file", errno.EPERM)
    with monkeypatch.context() as patch:
        patch.setattr(device, "dma_map_alias", lambda *_, **__: (_ for _ in ()).throw(refusal))
        with pytest.raises((ConnectionError, EOFError, AssertionError)):
            await dma_map(client, 0x10000, PAGE, memfd)
        await until(lambda: device.calls[-1] == DISCONNECTED)
    assert f"{refusal}; connection closed" in caplog.text
    other = connect()
    await negotiate(other)
    assert await dma_map(other, 0x10000, PAGE, memfd) == 0


async def test_ram_without_a_file_descriptor_is_said_once(
    client: RawClient, device: HostedEcho, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        assert await dma_map(client, number << 21, 1 << 20, None) == 0
    assert await dma_map(client, 1 << 30, 1 << 20, None, flags=1) == 0  # ROM never has one
    assert device.aliases == {}
    lines = [record.getMessage() for record in caplog.records if "share=on" in record.getMessage()]
    assert len(lines) == 1
    assert "--engine vfio-user" in lines[0]
    assert await dma_unmap(client, 0, 1 << 20) == 0
    assert "dma_unmap" not in device.names()


async def test_memory_of_other_devices_is_not_taken_for_ram(
    client: RawClient, device: HostedEcho, memfd: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert await dma_map(client, 0, 4 * PAGE, memfd) == 0
    assert await dma_map(client, 0xFD00_0000, 16 << 20, None) == 0  # VGA: it never has a file descriptor
    assert "share=on" not in caplog.text


async def test_memory_that_cannot_be_had_is_logged(
    client: RawClient, device: HostedEcho, memfd: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The library has said yes already."""
    device.alias_error = PeerError("DMA_MAP of 0x10000: no room", errno.ENOMEM)
    assert await dma_map(client, 0x10000, PAGE, memfd) == 0
    assert any("no room; the client cannot be told" in record.getMessage() for record in caplog.records)
    assert await dma_unmap(client, 0x10000, PAGE) == 0
    assert "dma_unmap" not in device.names()


# ---- quiet -----------------------------------------------------------------------------------------------------------


async def test_an_unmap_waits_until_the_device_is_quiet(
    client: RawClient, device: HostedEcho, memfd: int, eventfd: int
) -> None:
    await dma_map(client, 0x10000, PAGE, memfd)
    await set_irqs(client, PciIrq.MSIX, 0x24, 0, 1, (eventfd,))
    device.quiesce_hold = hold = Hold()
    await client.send(client.request(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x10000, PAGE)))
    await client.silence(0.1)
    assert device.calls[-1] == ("quiesce",)
    assert device.trigger is not None
    assert device.trigger(0) is False  # none of the library's functions may be called now
    refused = [0]
    device.on_retry = lambda: refused.append(device.trigger is not None and device.trigger(refused.pop()))
    hold.finish()
    assert (await client.receive()).error == 0
    assert device.calls[-2:] == [("dma_unmap", 0x10000, PAGE), ("resume",)]
    assert events(eventfd) == 1
    assert await read(client, 0, 0, 1) == b"\0"


async def test_patience_ends(
    client: RawClient, device: HostedEcho, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.05)
    expired = []

    def expire() -> None:
        expired.append(True)
        hold.finish()

    await dma_map(client, 0x10000, PAGE, memfd)
    device.quiesce_hold = hold = Hold(1, expire)
    assert await dma_unmap(client, 0x10000, PAGE) == 0
    assert expired == [True]


async def test_a_client_that_leaves_while_the_device_becomes_quiet(
    client: RawClient, device: HostedEcho, connect: Connect, memfd: int
) -> None:
    await dma_map(client, 0x10000, PAGE, memfd)
    device.quiesce_hold = hold = Hold()
    await client.send(client.request(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x10000, PAGE)))
    await until(lambda: device.calls[-1] == ("quiesce",) and device.quiesce_hold is None)
    client.close()
    await trio.sleep(0.02)
    assert DISCONNECTED not in device.calls
    hold.finish()
    await until(lambda: DISCONNECTED in device.calls)
    await negotiate(connect())


async def test_a_client_that_leaves_is_gone_when_the_device_is_quiet(
    client: RawClient, device: HostedEcho, connect: Connect, memfd: int
) -> None:
    await dma_map(client, 0x10000, PAGE, memfd)
    device.quiesce_hold = hold = Hold()
    client.close()
    await until(lambda: device.calls[-1] == ("quiesce",) and device.quiesce_hold is None)
    await trio.sleep(0.02)
    assert "dma_unmap" not in device.names()
    hold.finish()
    await until(lambda: device.calls[-1] == ("resume",))
    assert device.names()[-3:] == ["dma_unmap", "disconnected", "resume"]
    await negotiate(connect())


async def test_the_next_client_waits_for_what_the_last_one_left(
    client: RawClient, device: HostedEcho, connect: Connect
) -> None:
    device.disconnect_hold = hold = Hold()
    client.close()
    await until(lambda: DISCONNECTED in device.calls)
    second = connect()
    await second.send(second.request(Command.VERSION, struct.pack("<HH", 0, 0)))
    await second.silence(0.1)
    hold.finish()
    assert (await second.receive()).error == 0


# ---- resets ----------------------------------------------------------------------------------------------------------


async def test_kinds_of_reset(client: RawClient, device: HostedEcho) -> None:
    assert (await client.call(Command.DEVICE_RESET)).error == 0
    assert device.names()[-2:] == ["quiesce", "reset"]
    client.close()
    await until(lambda: DISCONNECTED in device.calls)
    assert device.names().count("reset") == 1


async def test_what_comes_behind_a_reset_waits_for_its_end(client: RawClient, device: HostedEcho) -> None:
    device.hold = hold = Hold()
    assert (await client.call(Command.DEVICE_RESET)).error == 0
    await client.send(client.request(Command.REGION_READ, struct.pack("<QII", 0, 0, 4)))
    await client.silence(0.1)
    hold.finish()
    assert (await client.receive()).error == 0
