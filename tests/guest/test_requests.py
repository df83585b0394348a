"""Requests by many tasks over one queue: full queues, tasks that give up, posted ones, and who owns the memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.waiting import begin_and_cancel

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.guest import DeviceBroken, DeviceGone, RequestQueue, VirtioDevice
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Chain, Device, queue


class Slow(Device):
    """Keeps every chain until `answer`."""

    device_id = 4
    requestq = queue(max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []
        self.got: list[bytes] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            data = chain.readable.read()
            if data == b"!":
                raise GuestError("told to")
            self.got.append(data)
            chain.writable.write(data[: chain.writable.length])
            self.kept.append(chain)

    def answer(self) -> None:
        kept, self.kept = self.kept, []
        for chain in kept:
            chain.complete()


@asynccontextmanager
async def opened(*, indirect: bool = True) -> AsyncIterator[tuple[RequestQueue, Slow, Loopback]]:
    with trio.fail_after(60):
        async with Loopback(slow := Slow(), memory_size=1 << 20) as transport:
            device = VirtioDevice(transport, feature_mask=-1 if indirect else ~(1 << 28))
            await device.start()
            await device.negotiate(0)
            queue = await RequestQueue.open(device, 0)
            await device.ready()
            yield queue, slow, transport
            await device.reset()
            queue.close()
            queue.vq.close()
            transport.memory.alloc(transport.memory.size)  # all of it has come back


async def test_pieces_of_both_kinds() -> None:
    async with opened() as (queue, device, _), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            written, data = await queue.request([b"ab", b"cde"], [1, 7])
            assert (written, data) == (5, [b"a", b"bcde\0\0\0"])

        await trio.testing.wait_all_tasks_blocked()
        device.answer()


@pytest.mark.parametrize("indirect", [False, True])
async def test_more_tasks_than_room(indirect: bool) -> None:
    async with opened(indirect=indirect) as (queue, device, _):
        answers: list[bytes] = []

        async def ask(number: int) -> None:
            _, [data] = await queue.request([bytes([number])], [1])
            answers.append(data)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, number)
            while len(answers) < 10:
                await trio.testing.wait_all_tasks_blocked()
                assert len(device.kept) == min(4 if indirect else 2, 10 - len(answers))
                device.answer()
                await trio.testing.wait_all_tasks_blocked()
        assert sorted(answers) == [bytes([number]) for number in range(10)]


async def test_a_task_that_gives_up_leaves_its_memory_to_the_device() -> None:
    async with opened() as (queue, device, transport):
        await begin_and_cancel(queue.request, [b"x"], [100])
        taken = transport.memory.size - transport.memory.unallocated
        assert taken >= 101
        device.answer()
        await trio.testing.wait_all_tasks_blocked()
        assert transport.memory.size - transport.memory.unallocated < taken - 100


async def test_a_task_that_gives_up_before_there_was_room() -> None:
    async with opened() as (queue, device, _), trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(queue.request, [b"x"], [1])
        await trio.testing.wait_all_tasks_blocked()
        await begin_and_cancel(queue.request, [b"y"], [1])
        device.answer()
        await trio.testing.wait_all_tasks_blocked()
        assert device.got == [b"x"] * 4


async def test_post_waits_for_nothing_and_keeps_the_order() -> None:
    async with opened() as (queue, device, _):
        for number in range(10):
            queue.post([bytes([number])])
        while len(device.got) < 10:
            await trio.testing.wait_all_tasks_blocked()
            device.answer()
        assert device.got == [bytes([number]) for number in range(10)]


async def test_what_was_posted_and_never_sent_is_freed() -> None:
    async with opened() as (queue, _, _):
        for _ in range(10):
            queue.post([b"x"])
        await trio.testing.wait_all_tasks_blocked()


async def test_everybody_learns_of_needs_reset() -> None:
    async with opened() as (queue, _, _):
        ends: list[type[Exception]] = []

        async def ask(data: bytes) -> None:
            try:
                await queue.request([data], [1])
            except DeviceBroken as error:
                ends.append(type(error))

        async with trio.open_nursery() as nursery:
            for data in (b"x", b"y", b"!"):
                nursery.start_soon(ask, data)
        assert ends == [DeviceBroken] * 3


async def test_everybody_learns_of_a_reset() -> None:
    async with opened() as (queue, _, _):
        ends: list[str] = []

        async def ask() -> None:
            with pytest.raises(DeviceGone):
                await queue.request([b"x"], [1])
            ends.append("gone")

        async with trio.open_nursery() as nursery:
            for _ in range(6):  # two of them are waiting for room
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await queue.device.reset()
        assert ends == ["gone"] * 6


async def test_no_room_in_memory() -> None:
    async with opened() as (queue, _, _):
        with pytest.raises(MemoryError):
            await queue.request([b"x"], [2 << 20])
