"""The host's end of the guest's agent, with the test as the guest."""

import re
import socket
import tracemalloc
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from support.waiting import begin_and_cancel

from vfiouser_virtio.vm.agent import MAX_COMMAND, MAX_OUTPUT, Agent, AgentClosedError, CommandResult, GuestRebootedError

BOOT = "0b5e6f0c-53a5-4bd1-9a4b-3d0f2e1c7a%02d"


class FakeGuest:
    """The guest's end of the wire."""

    def __init__(self, sock: socket.socket) -> None:
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def ready(self, boot: int) -> None:
        await self.stream.send_all(f"vm-agent ready {BOOT % boot}\n".encode())

    async def take(self) -> tuple[bytes, bytes]:
        """A command's token and script."""
        received = b""
        while not (match := re.match(rb"([0-9a-f]+) (\d+) \w+\n", received)) or len(received) < match.end() + int(
            match[2]
        ):
            received += await self.stream.receive_some()
        return match[1], received[match.end() :]

    async def answer(self, token: bytes, status: int, output: bytes) -> None:
        await self.stream.send_all(b"vm-agent done %s %d %d\n" % (token, status, len(output)) + output)


@pytest.fixture
def pair() -> Iterator[tuple[Agent, FakeGuest]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Agent(ours), FakeGuest(theirs)


async def test_output_that_looks_like_an_answer_is_output(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair
    output = b"vm-agent done 00 1 2\n\xff\x00vm-agent ready " + (BOOT % 1).encode() + b"\n"

    async def serve() -> None:
        token, script = await guest.take()
        assert script == b"printf '\xc3\xa9'\n"
        await guest.answer(token, 7, output)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        result = await agent.execute("printf 'é'\n")
    assert result == CommandResult(output.decode(errors="replace"), 7, output)


async def test_a_guest_that_writes_without_an_end_gets_no_memory_of_ours(pair: tuple[Agent, FakeGuest]) -> None:
    """Without a newline, or as the output of a command that has an incredible length."""
    agent, guest = pair

    async def serve() -> None:
        token, _ = await guest.take()
        for _ in range(64):
            await guest.stream.send_all(bytes(64 << 10))
        for size in (MAX_OUTPUT + 1, int("9" * 9), int("9" * 4000)):
            await guest.stream.send_all(b"vm-agent done %s 0 %d\n" % (token, size))
        await guest.stream.send_all(b"vm-agent piece %s 1 " % token + b"9" * 5000 + b"\n")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(guest.answer, token, 0, b"well")

    tracemalloc.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            result = await agent.execute("true")
        assert result is not None
        assert result.output == "well"
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


async def test_answer_to_a_cancelled_command_is_skipped_even_in_pieces(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair
    await begin_and_cancel(agent.execute, "first")
    first, _ = await guest.take()
    await guest.stream.send_all(b"vm-agent done %s 0 6\nfir" % first)
    await begin_and_cancel(agent.execute, "second")
    second, _ = await guest.take()
    await guest.stream.send_all(b"st\n")
    await guest.answer(second, 0, b"second\n")

    async def serve() -> None:
        token, _ = await guest.take()
        await guest.answer(token, 0, b"third\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        result = await agent.execute("third")
    assert result is not None
    assert result.output == "third\n"


async def test_ready_only_counts_for_a_boot_that_is_new(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair
    await guest.stream.send_all(b"\x00\xffnoise of a boot\r\n")
    await guest.ready(1)
    await agent.wait_ready()
    assert agent.boot_id == BOOT % 1
    await agent.wait_ready()
    # The agent was started again, the guest was not.
    await guest.ready(1)
    with trio.move_on_after(0.1) as scope:
        await agent.wait_ready(new_boot=True)
    assert scope.cancelled_caught
    await guest.ready(2)
    await agent.wait_ready(new_boot=True)
    assert agent.boot_id == BOOT % 2


async def test_guest_that_starts_again_during_a_command(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.ready, 2)
        with pytest.raises(GuestRebootedError):
            await agent.execute("reboot")
    assert agent.boot_id == BOOT % 2


async def test_end_of_qemu(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair

    async def shut_down_when_it_waits() -> None:
        await trio.testing.wait_all_tasks_blocked()
        agent.shut_down()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.take)
        nursery.start_soon(shut_down_when_it_waits)
        with pytest.raises(AgentClosedError):
            await agent.execute("true")


async def test_too_long_a_command_is_refused(pair: tuple[Agent, FakeGuest]) -> None:
    agent, _ = pair
    with pytest.raises(ValueError, match="32769 bytes"):
        await agent.execute("x" * (MAX_COMMAND + 1))


async def test_streams_apart_come_at_once_and_end_at_the_token(pair: tuple[Agent, FakeGuest]) -> None:
    agent, guest = pair
    came = {1: b"", 2: b""}
    changed = trio.Event()

    async def output(stream: int, data: bytes) -> None:
        came[stream] += data
        nonlocal changed
        changed.set()
        changed = trio.Event()

    async def piece(stream: int, data: bytes, token: bytes, *, of: int | None = None) -> None:
        await guest.stream.send_all(b"vm-agent piece %s %d %d\n" % (token, stream, of or len(data)) + data)

    async def serve() -> None:
        token, _ = await guest.take()
        await piece(1, b"a\0\n", token)
        while came[1] != b"a\0\n":  # before anything else is said
            await changed.wait()
        await piece(2, b"half,", token, of=11)  # a piece that is not whole; "half" could end as a token begins
        while came[2] != b"half,":
            await changed.wait()
        await guest.stream.send_all(b" more" + token[:1])
        await piece(2, b"not it" + token + b"of the background", token)
        await piece(1, b"b" + token[:5], token)  # looks like the end
        await piece(1, b"c" + token, token)
        await guest.stream.send_all(b"vm-agent done %s 3 0\n" % token)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            result = await agent.execute("x", output=output)
    token = (came[2].removeprefix(b"half, more").removesuffix(b"not it")).decode()
    assert re.fullmatch("[0-9a-f]", token)
    assert came[1].startswith(b"a\0\nb")
    assert re.fullmatch(rb"a\0\nb[0-9a-f]{5}c", came[1])
    assert result == CommandResult("", 3, b"")
