"""A console whose other ends a test holds in its hands."""

import os

import trio

from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.guest import drivers

MUCH = os.urandom(50_000)


class HostedConsole(Console):
    """A console, and the streams at the other ends of its ports."""

    def __init__(self, *names: str) -> None:
        pairs = [pair() for _ in names]
        self.streams = [stream for _, stream in pairs]
        super().__init__(chardev=[chardev for chardev, _ in pairs], name=names, cols=100, rows=30)

    def close(self) -> None:
        super().close()
        for stream in self.streams:
            stream.socket.close()


async def talk(port: drivers.ConsolePort, stream: trio.SocketStream) -> None:
    """Short and long things, both ways at once."""

    async def out() -> None:
        await port.send(b"from the guest")
        await port.send(MUCH)

    async def back() -> None:
        await stream.send_all(b"from the host")
        await stream.send_all(MUCH[::-1])

    async def read_port() -> None:
        expected, data = b"from the host" + MUCH[::-1], b""
        while len(data) < len(expected):
            data += await port.receive()
        assert data == expected

    async def read_stream() -> None:
        expected, data = b"from the guest" + MUCH, b""
        while len(data) < len(expected):
            data += await stream.receive_some()
        assert data == expected

    async with trio.open_nursery() as nursery:
        for task in (out, back, read_port, read_stream):
            nursery.start_soon(task)
