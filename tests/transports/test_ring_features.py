"""What can be negotiated for rings and queues, over everything that carries a device, with the guest's side of it."""

import itertools
import logging
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from support.bare_device import bare_device

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import RequestQueue
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.testing.carriers import Carrier
from vfiouser_virtio.virtio import Chain, Device, Offer, Queue, queue
from vfiouser_virtio.virtio.options import Duration, Size

CARRIERS = ["loopback", "loopback-private", "socket", "socket-private"]
carriers = pytest.mark.parametrize("carrier", CARRIERS)
EVERYTHING = Offer(
    packed=True,
    in_order=True,
    notification_data=True,
    notif_config_data=True,
    suspend=True,
    iommu_platform=True,
)


@pytest.fixture(autouse=True)
def _nobody_complains(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """These drivers do nothing wrong."""
    yield
    warnings = [each.getMessage() for each in caplog.get_records("call") if each.levelno >= logging.WARNING]
    # On a busy machine a notification can come after the search for drivers that send none.
    harmless = "has no file descriptor", "does not notify the device"
    assert [text for text in warnings if not any(words in text for words in harmless)] == []


class Reverse(Device):
    """Ends every second request before the one that came before it."""

    device_id = 63
    requestq = queue(max_size=64)
    otherq = queue(max_size=16)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each, nursery)

    async def serve(self, served: Queue, nursery: trio.Nursery) -> None:
        number = 0
        async for chain in served:
            number += 1
            nursery.start_soon(self.answer, chain, number % 2)

    async def answer(self, chain: Chain, rounds: int) -> None:
        for _ in range(3 * rounds):
            await trio.lowlevel.checkpoint()
        if chain.writable.length:
            chain.writable.write(chain.readable.read())
        chain.complete()


async def exchange(requests: RequestQueue, count: int, name: bytes = b"") -> None:
    """Many requests at a time; each gets its own answer."""

    async def one(number: int) -> None:
        message = b"%s %d" % (name, number)
        answer = await requests.request([message[:1], message[1:]], [2, 30])
        assert b"".join(answer.data)[: len(message)] == message
        assert answer.written == len(message)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)


@pytest.mark.diagonal("carrier", "packed,event_idx,in_order,indirect_desc")
@carriers
@pytest.mark.parametrize(
    ("packed", "event_idx", "in_order", "indirect_desc"), list(itertools.product([False, True], repeat=4))
)
async def test_every_kind_of_ring(
    carrier: Carrier, packed: bool, event_idx: bool, in_order: bool, indirect_desc: bool
) -> None:
    offer = Offer(packed=packed, event_idx=event_idx, in_order=in_order, indirect_desc=indirect_desc)
    async with bare_device(Reverse(), carrier, offer) as device:
        assert device.features == offer.features
        requests = await RequestQueue.open(device, 0)
        other = await RequestQueue.open(device, 1)
        await device.ready()
        for _ in range(3):  # rings wrap
            await exchange(requests, 50)
            await exchange(other, 20)


@carriers
async def test_everything_at_once(carrier: Carrier) -> None:
    async with bare_device(Reverse(), carrier, EVERYTHING) as device:
        assert device.features == EVERYTHING.features
        requests = await RequestQueue.open(device, 0)
        await device.ready()
        for _ in range(3):
            await exchange(requests, 70)
            await device.suspend()
            await device.resume()


# ---- sizes ---------------------------------------------------------------------------------------------------------


@carriers
@pytest.mark.parametrize(("packed", "size"), [(False, 4), (False, 32768), (True, 5), (True, 1000)])
async def test_queue_sizes(carrier: Carrier, packed: bool, size: int) -> None:
    async with bare_device(Reverse(), carrier, Offer(packed=packed, queue_size=size)) as device:
        assert await device.transport.queue_max_size(0) == size
        requests = await RequestQueue.open(device, 0, size=size)
        assert requests.vq.size == size
        await device.ready()
        await exchange(requests, 40)


@carriers
@pytest.mark.parametrize("packed", [False, True])
async def test_a_queue_of_one(carrier: Carrier, packed: bool) -> None:
    async with bare_device(Rng(), carrier, Offer(packed=packed, queue_size=1)) as device:
        requests = await RequestQueue.open(device, 0)
        assert requests.vq.size == 1
        await device.ready()
        answers = [await requests.request([], [16]) for _ in range(5)]
        assert len({answer.data[0] for answer in answers}) == 5


@carriers
async def test_an_odd_size_is_for_packed_queues(carrier: Carrier) -> None:
    offer = Offer(packed=True, queue_size=100)
    async with bare_device(Reverse(), carrier, offer, features=~Feature.RING_PACKED.mask) as device:
        assert await device.transport.queue_max_size(0) == 64
        requests = await RequestQueue.open(device, 0)
        await device.ready()
        await exchange(requests, 100)


# ---- queue reset ---------------------------------------------------------------------------------------------------


@pytest.mark.diagonal("carrier", "packed")
@carriers
@pytest.mark.parametrize("packed", [False, True])
async def test_a_queue_is_enabled_again_at_another_size_and_place(carrier: Carrier, packed: bool) -> None:
    """QR1 to QR3: the new queue begins at the beginning; the other one never notices."""
    async with bare_device(Reverse(), carrier, Offer(packed=packed)) as device:
        requests = await RequestQueue.open(device, 0)
        other = await RequestQueue.open(device, 1)
        await device.ready()
        for size in (32, 4, 64, 7 if packed else 8, 64):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange, requests, 100, b"before")
                nursery.start_soon(exchange, other, 100, b"other")
                await trio.sleep(0.002)
                before = requests.vq
                await requests.resize(size)
            assert requests.vq.size == size
            assert {before.desc, before.driver, before.device}.isdisjoint(
                {requests.vq.desc, requests.vq.driver, requests.vq.device}
            )
            await exchange(requests, 2 * size + 1, b"after")


@carriers
async def test_a_disk_lives_on_when_a_queue_is_reset_under_its_requests(carrier: Carrier) -> None:
    device = Blk(size=Size(1 << 20), num_queues=2, delay=Duration(0.02))
    async with bare_device(device, carrier, Offer()) as found:
        queues = [await RequestQueue.open(found, index) for index in range(2)]
        await found.ready()
        header = blk.REQUEST_HEADER_CODEC.pack(blk.RequestType.IN, 0, 0)
        async with trio.open_nursery() as nursery:
            for each in (*queues, *queues):
                nursery.start_soon(each.request, [header], [512, 1])
            await trio.sleep(0.01)
            await queues[0].resize(16)
        assert not await found.read_status() & DeviceStatus.NEEDS_RESET
        answer = await queues[0].request([header], [512, 1])
        assert answer.data[1] == b"\0"


@carriers
async def test_a_device_that_holds_a_buffer_lives_on_when_its_queue_is_reset(carrier: Carrier) -> None:
    """It may complete the buffer later, which means nothing to anybody."""
    rng = Rng(max_bytes=Size(8), period=50)
    async with bare_device(rng, carrier, Offer()) as found:
        requests = await RequestQueue.open(found, 0)
        await found.ready()
        await requests.request([], [8])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.request, [], [8])
            await trio.sleep(0.01)
            await requests.resize(16)
        assert not await found.read_status() & DeviceStatus.NEEDS_RESET


# ---- more than there is room for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["loopback-private", "socket-private"])
@pytest.mark.parametrize("packed", [False, True])
async def test_requests_wait_for_room_for_their_copies(
    carrier: Carrier, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiouser_virtio.vring import shadow

    monkeypatch.setattr(shadow, "COPY", 0)
    monkeypatch.setattr(shadow, "MAX_COPIES", 200)
    async with bare_device(Reverse(), carrier, Offer(packed=packed)) as device:
        requests = await RequestQueue.open(device, 0)
        await device.ready()
        await exchange(requests, 60)


class Keeps(Device):
    """Has what it takes until it is told to let go of it, and counts."""

    device_id = 63

    def __init__(self) -> None:
        super().__init__()
        for _ in range(6):
            self.add_queue(16)
        self.let_go = trio.Event()
        self.taken = [0] * 6
        self.has = self.most = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each, nursery)

    async def serve(self, served: Queue, nursery: trio.Nursery) -> None:
        async for chain in served:
            self.taken[served.index] += 1
            self.has += chain.writable.length
            self.most = max(self.most, self.has)
            nursery.start_soon(self.keep, chain)

    async def keep(self, chain: Chain) -> None:
        await self.let_go.wait()
        self.has -= chain.writable.length
        chain.writable.write(b"done")
        chain.complete()


async def test_the_room_for_copies_is_that_of_a_whole_device(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 queues do not make 64 times as much of it, and none of them is without any."""
    from vfiouser_virtio.vring import shadow

    monkeypatch.setattr(shadow, "COPY", 0)
    monkeypatch.setattr(shadow, "MAX_COPIES", 12 * 512)
    device = Keeps()
    async with bare_device(device, "loopback-private", Offer()) as found:
        queues = [await RequestQueue.open(found, index) for index in range(6)]
        await found.ready()
        async with trio.open_nursery() as nursery:
            for requests in queues:
                for _ in range(10):
                    nursery.start_soon(requests.request, [], [512])
                if requests is queues[0]:  # it takes all that it can get before the others come
                    await trio.sleep(1)
            await trio.sleep(1)
            assert device.taken == [7, 1, 1, 1, 1, 1]
            device.let_go.set()
    assert device.taken == [10] * 6
    assert device.most == 12 * 512


async def test_a_queue_that_is_reset_gives_its_room_to_others(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiouser_virtio.vring import shadow

    monkeypatch.setattr(shadow, "COPY", 0)
    monkeypatch.setattr(shadow, "MAX_COPIES", 12 * 512)
    device = Keeps()
    async with bare_device(device, "loopback-private", Offer()) as found:
        queues = [await RequestQueue.open(found, index) for index in range(6)]
        await found.ready()
        async with trio.open_nursery() as nursery:
            for requests in queues[:2]:
                for _ in range(10):
                    nursery.start_soon(requests.request, [], [512])
                await trio.sleep(1)
            assert device.taken[:2] == [7, 1]
            nursery.cancel_scope.cancel()
        # Not `resize`: that asks again for what was under way, and whether it is first is a matter of chance.
        await found.transport.reset_queue(0)
        await trio.sleep(1)
        assert device.taken[1] > 1
        device.let_go.set()
