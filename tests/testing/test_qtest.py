"""The qtest protocol, with a QEMU that is played here."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.testing.qtest import Qtest, QtestClosed


class Played:
    """The other end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self.received = b""

    async def expect(self, text: bytes) -> None:
        with trio.fail_after(60):
            while len(self.received) < len(text):
                self.received += await self.stream.receive_some()
        assert self.received == text
        self.received = b""

    async def say(self, text: bytes) -> None:
        await self.stream.send_all(text)


@asynccontextmanager
async def talking(
    on_irq: Callable[[int, bool], None] = lambda line, level: None,
) -> AsyncIterator[tuple[Qtest, Played]]:
    ours, theirs = socket.socketpair()
    qtest, qemu = Qtest(ours, on_irq), Played(theirs)
    try:
        async with background() as nursery:
            nursery.start_soon(qtest.run)
            yield qtest, qemu
    finally:
        qtest.close()
        qemu.stream.socket.close()


async def test_answers_belong_to_commands_in_order() -> None:
    results = {}

    async def read(qtest: Qtest, address: int, size: int) -> None:
        results[address] = await qtest.read(address, size)

    async with talking() as (qtest, qemu), trio.open_nursery() as nursery:
        nursery.start_soon(read, qtest, 0x10, 4)
        await trio.testing.wait_all_tasks_blocked()
        qtest.post_write(0x20, 8, 0xABC)
        nursery.start_soon(read, qtest, 0x30, 1)
        await qemu.expect(b"readl 0x10\nwriteq 0x20 0xabc\nreadb 0x30\n")
        await qemu.say(b"OK 0x00000000000000")
        await qemu.say(b"ff\nOK\nOK 0x0000000000000007\n")
    assert results == {0x10: 0xFF, 0x30: 7}


async def test_interrupt_lines_come_between_answers() -> None:
    changes = []
    async with talking(lambda line, level: changes.append((line, level))) as (qtest, qemu), trio.open_nursery() as n:
        n.start_soon(qtest.write, 0x10, 2, 1)
        await qemu.expect(b"writew 0x10 0x1\n")
        await qemu.say(b"IRQ raise 21\nOK\nIRQ lower 21\nIRQ raise 22\n")
        await trio.testing.wait_all_tasks_blocked()
    assert changes == [(21, True), (21, False), (22, True)]


async def test_a_refused_command_is_its_callers_error() -> None:
    async with talking() as (qtest, qemu), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            with pytest.raises(RuntimeError, match=r"'irq_intercept_in nonsense' with 'FAIL Unknown device'"):
                await qtest.execute("irq_intercept_in nonsense")

        await qemu.expect(b"irq_intercept_in nonsense\n")
        await qemu.say(b"FAIL Unknown device\n")


async def test_a_refused_post_is_not_lost() -> None:
    async def post() -> None:
        async with talking() as (qtest, qemu):
            qtest.post("nonsense")
            await qemu.say(b"FAIL Unknown command\n")
            await trio.sleep(5)

    with pytest.raises(RuntimeError, match="'nonsense' with 'FAIL"):
        await post()


async def test_who_waits_when_qemu_ends() -> None:
    async with talking() as (qtest, qemu):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ask() -> None:
                with pytest.raises(QtestClosed, match="during 'readl 0x10'"):
                    await qtest.read(0x10, 4)

            await qemu.expect(b"readl 0x10\n")
            await qemu.stream.aclose()
        with pytest.raises(QtestClosed, match="has ended"):
            await qtest.read(0x10, 4)
