"""Queues of a device that is running: reset alone, and set up again with another size, in other memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from vfiouser_virtio.guest import (
    DriverVirtqueue,
    RequestQueue,
    VirtioDevice,
    free_vq,
    make_virtqueue,
    new_vq,
    resize_vq,
)
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.vfio_user import PrivateMemory
from vfiouser_virtio.virtio import Chain, Device, Offer, queue


class Slow(Device):
    """Keeps what begins with ``?``, for ever; uppercases the rest."""

    device_id = 4
    requestq = queue(max_size=64)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []
        self.got: list[bytes] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            data = chain.readable.read()
            self.got.append(data)
            if data[:1] == b"?":
                self.kept.append(chain)
            else:
                chain.writable.write(data.upper())
                chain.complete()


@asynccontextmanager
async def started(**offer: Any) -> AsyncIterator[tuple[VirtioDevice, Slow]]:
    with trio.fail_after(60):
        async with Loopback(slow := Slow(), memory_size=1 << 20, offer=Offer(**offer)) as transport:
            device = VirtioDevice(transport)
            await device.start()
            await device.negotiate(0)
            yield device, slow
            await device.reset()
            for vq in list(device.virtqueues.values()):
                await free_vq(vq)


def ignore(vq: DriverVirtqueue) -> bool:
    return True


def send(device: VirtioDevice, vq: DriverVirtqueue, data: bytes) -> None:
    buffer = device.memory.alloc(2 * len(data))
    buffer.view[: len(data)] = data
    pieces = [(buffer.address, len(data)), (buffer.address + len(data), len(data))]
    vq.add_buf(pieces, 1, 1, data)
    vq.kick()


def test_the_kind_is_what_was_negotiated() -> None:
    with PrivateMemory(1 << 20) as memory:
        made = [make_virtqueue(memory, 0, 4, lambda: None, features=0)]
        made += [make_virtqueue(memory, 0, 3, lambda: None, features=Feature.RING_PACKED.mask)]
        for feature in (Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER):
            made.append(make_virtqueue(memory, 0, 4, lambda: None, features=feature.mask))
    assert [type(vq).__name__ for vq in made[:2]] == ["SplitVirtqueue", "PackedVirtqueue"]
    assert [(vq.event_idx, vq.indirect, vq.in_order) for vq in made[1:]] == [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


async def test_another_size() -> None:
    async with started() as (device, slow):
        used: list[tuple[object, int]] = []

        def callback(vq: DriverVirtqueue) -> bool:
            while got := vq.get_buf():
                used.append(got)
            return True

        vq = await new_vq(device, 0, callback, size=8)
        await device.ready()
        for data in (b"one", b"?", b"two", b"?!"):
            send(device, vq, data)
        while len(slow.kept) < 2 or len(used) < 2:
            await trio.sleep(0.001)
        vq.add_buf([(device.memory.alloc(1).address, 1)], 1, 0, "never shown")
        vq, tokens = await resize_vq(vq, 32)
        assert (vq.size, vq.index, tokens) == (32, 0, [b"?", b"?!", "never shown"])
        assert device.virtqueues == {0: vq}
        for number in range(40):
            send(device, vq, b"%d" % number)
            while len(used) < 3 + number:
                await trio.lowlevel.checkpoint()
        assert used[:3] == [(b"one", 3), (b"two", 3), (b"0", 1)]


async def test_what_was_used_before_the_reset_is_not_asked_for_again() -> None:
    async with started() as (device, slow):
        seen: list[object] = []

        def callback(vq: DriverVirtqueue) -> bool:
            while got := vq.get_buf():
                seen.append(got[0])
            return True

        vq = await new_vq(device, 0, callback, size=8)
        await device.ready()
        await device.transport.connect_interrupts(lambda index: None, lambda: None)  # its interrupt comes too late
        send(device, vq, b"used")
        while slow.got != [b"used"]:
            await trio.sleep(0.001)
        await trio.testing.wait_all_tasks_blocked()
        _, tokens = await resize_vq(vq)
        assert (seen, tokens) == ([b"used"], [])


async def test_without_ring_reset() -> None:
    async with started(queue_reset=False) as (device, _):
        vq = await new_vq(device, 0, ignore)
        await device.ready()
        with pytest.raises(RuntimeError, match="without RING_RESET"):
            await resize_vq(vq, 4)
        assert vq.live
        assert not vq.stopped


async def test_requests_go_on_over_a_resize() -> None:
    async with started() as (device, slow):
        requests = await RequestQueue.open(device, 0, size=16)
        await device.ready()
        answers: list[bytes] = []

        async def ask(number: int) -> None:
            data = b"request %d" % number
            answer = await requests.request([data], [len(data)])
            answers.append(answer.data[0])

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(ask, number)
                if number % 10 == 0:
                    await requests.resize((2, 64, 2, 16, 4, 8)[number // 10])
        assert sorted(answers) == sorted(b"REQUEST %d" % number for number in range(60))
        assert len(slow.got) >= 60


async def test_nothing_is_shown_while_it_is_resized() -> None:
    async with started() as (device, _):
        requests = await RequestQueue.open(device, 0, size=4)
        await device.ready()
        reset_queue = device.transport.reset_queue
        more: list[bytes] = []

        async def ask() -> None:
            more.append((await requests.request([b"late"], [4])).data[0])

        async with trio.open_nursery() as nursery:

            async def slowly(index: int) -> None:
                await reset_queue(index)
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                assert requests.vq.num_in_flight == 0

            device.transport.reset_queue = slowly
            await requests.resize(8)
        assert more == [b"LATE"]


async def test_sizes_beyond_what_is_offered_are_cut() -> None:
    async with started() as (device, _):
        assert (await new_vq(device, 0, size=4096)).size == 64


async def test_a_size_that_a_split_queue_cannot_have() -> None:
    async with started() as (device, _):
        with pytest.raises(ValueError, match="power of two"):
            await new_vq(device, 0, size=3)
        assert device.virtqueues == {}


async def test_notifications_with_data() -> None:
    async with started(notification_data=True, notif_config_data=True) as (device, _):
        notified: list[tuple[int, ...]] = []
        notify = device.transport.notify

        def spy(*arguments: Any) -> None:
            notified.append(arguments)
            notify(*arguments)

        replacement: Any = spy
        device.transport.notify = replacement
        vq = await new_vq(device, 0, ignore, size=4)
        await device.ready()
        for _ in range(3):
            send(device, vq, b"x")
            while vq.get_buf() is None:
                await trio.lowlevel.checkpoint()
        assert notified[0] == (0, 1)
        assert all(0 < next_available <= 3 for _, next_available in notified)
