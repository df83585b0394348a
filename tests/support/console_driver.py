"""The driver's side of a console's control queues, and two ports with sockets."""

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.testing.driver import Driver

SIZE, MULTIPORT, EMERG_WRITE, VERSION_1 = 1, 2, 4, 1 << 32
READY, ADD, REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = range(8)
CONTROL_RX, CONTROL_TX = 2, 3

Run = Callable[..., AbstractAsyncContextManager[Driver]]


def control(port: int, event: int, value: int = 1) -> bytes:
    return struct.pack("<IHH", port, event, value)


async def tell(driver: Driver, *messages: bytes) -> None:
    """Send control messages; each is taken."""
    for message in messages:
        assert (await driver.request([message], queue=CONTROL_TX)).written == 0


class Control:
    """The driver's control receiveq, with buffers in it."""

    def __init__(self, driver: Driver, buffers: int = 16) -> None:
        self.driver = driver
        self.tokens = [driver.add(CONTROL_RX, [], [256]) for _ in range(buffers)]
        driver.kick(CONTROL_RX, force=True)

    async def next(self) -> bytes:
        used = await self.driver.wait(CONTROL_RX, self.tokens.pop(0))
        self.tokens.append(self.driver.add(CONTROL_RX, [], [256]))
        self.driver.kick(CONTROL_RX)
        return used.data[0][: used.written]

    async def take(self, count: int) -> list[bytes]:
        return [await self.next() for _ in range(count)]

    async def silent(self) -> bool:
        await trio.testing.wait_all_tasks_blocked(0.02)
        return not self.driver.is_used(CONTROL_RX, self.tokens[0])


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(60):
        while len(data) < count:
            piece = await stream.receive_some(count - len(data))
            assert piece, "the port was closed"
            data += piece
    return data


@asynccontextmanager
async def two_ports(run: Run) -> AsyncIterator[tuple[Console, Driver, Control, trio.SocketStream, trio.SocketStream]]:
    """A console and a channel, after the handshake, both open in the guest."""
    (first, first_end), (second, second_end) = pair(), pair()
    console = Console(chardev=[first, second], name=["", "org.example"], cols=100, rows=30)
    async with first_end, second_end, run(console) as driver:
        inbox = Control(driver)
        await tell(driver, control(0, READY))
        assert await inbox.take(2) == [control(0, ADD), control(1, ADD)]
        await tell(driver, control(0, PORT_READY), control(1, PORT_READY))
        assert await inbox.take(5) == [
            control(0, CONSOLE_PORT),
            control(0, RESIZE, 0) + struct.pack("<HH", 100, 30),
            control(0, OPEN),
            control(1, NAME) + b"org.example",
            control(1, OPEN),
        ]
        await tell(driver, control(0, OPEN), control(1, OPEN))
        yield console, driver, inbox, first_end, second_end
