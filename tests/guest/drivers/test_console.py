"""The console driver."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.console import Console as Device
from vfiouser_virtio.guest import ConsolePorts, VirtioDevice
from vfiouser_virtio.guest.drivers import console as driver
from vfiouser_virtio.protocols.virtio.console import Event

Drive = Callable[..., AbstractAsyncContextManager[VirtioDevice]]


@asynccontextmanager
async def two_ports(drive: Drive) -> AsyncIterator[tuple[ConsolePorts, Device, trio.SocketStream, trio.SocketStream]]:
    (first, first_end), (second, second_end) = pair(), pair()
    device = Device(chardev=[first, second], name=["", "org.example"], cols=100, rows=30)
    async with first_end, second_end, drive(device) as driven:
        yield driven.driver_data, device, first_end, second_end


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += await stream.receive_some(count - len(data))
    return data


async def test_a_plain_console(drive: Drive) -> None:
    chardev, stream = pair()
    async with stream, drive(Device(chardev=[chardev], cols=80, rows=24)) as device:
        console = device.driver_data
        port = await console.wait_port(0)
        assert list(console.ports) == [0]
        assert (port.added, port.is_console, port.host_open) == (True, True, True)
        await port.send(b"login: ")
        assert await exactly(stream, 7) == b"login: "
        await stream.send_all(b"root\r")
        assert await port.receive(2) == b"ro"
        assert await port.receive() == b"ot\r"
        assert await console.size() == (80, 24)


async def test_what_the_device_says_of_its_ports(drive: Drive) -> None:
    async with two_ports(drive) as (console, _, _, _):
        first, second = await console.wait_port(0), await console.wait_port(1)
        await first.wait_for(lambda port: port.size == (100, 30) and port.is_console and port.host_open)
        await second.wait_for(lambda port: port.name == "org.example" and port.host_open)
        assert not second.is_console
        events = [(port, event) for port, event, _, _ in console.messages]
        assert events[:2] == [(0, Event.PORT_ADD), (1, Event.PORT_ADD)]


async def test_bytes_both_ways_on_each_port(drive: Drive) -> None:
    async with two_ports(drive) as (console, _, first_end, second_end):
        for number, stream in enumerate((first_end, second_end)):
            port = await console.wait_port(number)
            await port.open()
            await port.send(b"to the host")
            assert await exactly(stream, 11) == b"to the host"
            await stream.send_all(b"to the guest")
            data = b""
            while len(data) < 12:
                data += await port.receive()
            assert data == b"to the guest"


async def test_a_port_that_is_closed_gets_nothing(drive: Drive) -> None:
    async with two_ports(drive) as (console, _, first_end, _):
        port = await console.wait_port(0)
        await port.open()
        await first_end.send_all(b"a")
        assert await port.receive() == b"a"
        await port.close()
        await first_end.send_all(b"b")
        with trio.move_on_after(0.05) as scope:
            await port.receive()
        assert scope.cancelled_caught
        await port.open()
        assert await port.receive() == b"b"


async def test_much_data(drive: Drive) -> None:
    chardev, stream = pair()
    data = bytes(range(256)) * 1024
    async with stream, drive(Device(chardev=[chardev])) as device:
        port = device.driver_data.ports[0]
        received = b""

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            while len(received) < len(data):
                received += await port.receive()
        assert received == data
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.send, data)
            assert await exactly(stream, len(data)) == data


async def test_resize_and_the_host_leaving(drive: Drive) -> None:
    async with two_ports(drive) as (console, device, _, second_end):
        first, second = await console.wait_port(0), await console.wait_port(1)
        await first.wait_for(lambda port: port.size is not None)
        device.resize(132, 50)
        await first.wait_for(lambda port: port.size == (132, 50))
        assert await console.size() == (132, 50)
        await second.wait_for(lambda port: port.host_open)
        await second_end.aclose()
        await second.wait_for(lambda port: not port.host_open)


async def test_emergency_write(drive: Drive) -> None:
    async with two_ports(drive) as (console, _, first_end, _):
        await console.emergency_write(ord("!"))
        assert await exactly(first_end, 1) == b"!"


async def test_without_multiport_there_is_port_0(drive: Drive) -> None:
    (first, first_end), (second, second_end) = pair(), pair()
    async with first_end, second_end, drive(Device(chardev=[first, second]), feature_mask=~(1 << 1)) as device:
        assert list(device.driver_data.ports) == [0]
        await device.driver_data.ports[0].send(b"x")
        assert await exactly(first_end, 1) == b"x"


async def test_more_ports_than_anybody_uses(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "MAX_PORTS", 2)
    pairs = [pair() for _ in range(3)]
    async with drive(Device(chardev=[chardev for chardev, _ in pairs])) as device:
        console = device.driver_data
        await console.wait_port(1)
        while len(console.messages) < 3:
            await device.wait(console.changed)
        assert list(console.ports) == [0, 1]
    assert "has 3 ports; the first 2 are used" in caplog.text
    assert "for port 2, which it does not have" in caplog.text
    for _, end in pairs:
        await end.aclose()
