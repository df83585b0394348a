"""Consoles as their driver has them, over every carrier."""

import pytest
import trio
from support.consoles import HostedConsole, talk

from vfiouser_virtio.guest import VirtioDevice, drivers


class TestOnePort:
    """Without MULTIPORT."""

    @pytest.fixture
    def virtio_device(self) -> HostedConsole:
        return HostedConsole("")

    async def test_bytes_both_ways(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        console: drivers.ConsolePorts = virtio_guest.driver_data
        assert list(console.ports) == [0]
        await talk(console.ports[0], virtio_device.streams[0])

    async def test_size_and_resize(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        console: drivers.ConsolePorts = virtio_guest.driver_data
        assert await console.size() == (100, 30)
        told = trio.Event()
        virtio_guest.on_config = told.set
        virtio_device.resize(132, 50)
        await told.wait()
        assert await console.size() == (132, 50)

    async def test_emergency_write(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        await virtio_guest.driver_data.emergency_write(ord("!"))
        assert await virtio_device.streams[0].receive_some() == b"!"


class TestTwoPorts:
    """A console, and a channel with a name."""

    @pytest.fixture
    def virtio_device(self) -> HostedConsole:
        return HostedConsole("", "org.example")

    async def test_bytes_both_ways(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        console: drivers.ConsolePorts = virtio_guest.driver_data
        for number, (name, is_console) in enumerate([("", True), ("org.example", False)]):
            port = await console.wait_port(number)
            await port.open()
            await port.wait_for(lambda port: port.host_open)
            assert (port.name, port.is_console) == (name, is_console)
            await talk(port, virtio_device.streams[number])

    async def test_the_host_leaves(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        port = await virtio_guest.driver_data.wait_port(1)
        await port.open()
        await port.wait_for(lambda port: port.host_open)
        await virtio_device.streams[1].aclose()
        await port.wait_for(lambda port: not port.host_open)

    @pytest.mark.virtio_carriers("socket", "socket-private", "qtest", "libvfio-user")
    @pytest.mark.parametrize("virtio_interrupts", ["msix", "intx", "poll"])
    async def test_every_interrupt(self, virtio_guest: VirtioDevice, virtio_device: HostedConsole) -> None:
        port = await virtio_guest.driver_data.wait_port(1)
        await port.open()
        await talk(port, virtio_device.streams[1])
