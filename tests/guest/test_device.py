"""The child device as drivers see it: status, queues, NEEDS_RESET, resets, and who waits for what."""

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.guest import wait_forever

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.guest import DeviceBroken, DeviceGone, DriverVirtqueue, VirtioDevice, free_vq, new_vq, virtqueues
from vfiouser_virtio.guest import device as device_module
from vfiouser_virtio.protocols.virtio import console
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Chain, Device, queue


class Echo(Device):
    """Copies; a chain that begins with ``!`` is a bug in the device, ``?`` is never answered."""

    device_id = 3
    requestq = queue(max_size=512)
    idleq = queue(max_size=4)

    def __init__(self) -> None:
        super().__init__(config=console.Config(cols=80, rows=24))
        self.kept: list[Chain] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            data = chain.readable.read()
            if data == b"!":
                raise GuestError("told to")
            if data == b"?":
                self.kept.append(chain)
            else:
                chain.writable.write(data)
                chain.complete()


@asynccontextmanager
async def started(features: int = 0) -> AsyncIterator[tuple[VirtioDevice, Loopback]]:
    with trio.fail_after(60):
        async with Loopback(Echo()) as transport:
            device = VirtioDevice(transport)
            await device.start()
            await device.negotiate(features)
            yield device, transport


class Waiter:
    """A queue of one's own, with the two lines that every callback has."""

    def __init__(self) -> None:
        self.lot = trio.lowlevel.ParkingLot()
        self.used: list[tuple[object, int]] = []

    def __call__(self, vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            self.used.append(used)
        self.lot.unpark_all()
        return True


async def test_one_request_by_hand() -> None:
    async with started() as (device, _):
        waiter = Waiter()
        vq = await new_vq(device, 0, waiter)
        await device.ready()
        buffer = device.memory.alloc(8)
        buffer.view[:4] = b"ping"
        vq.add_buf([(buffer.address, 4), (buffer.address + 4, 4)], 1, 1, "token")
        vq.kick()
        while not waiter.used:
            await device.wait(waiter.lot)
        assert waiter.used == [("token", 4)]
        assert bytes(buffer.view) == b"pingping"


async def test_queue_sizes() -> None:
    async with started() as (device, transport):
        assert (await new_vq(device, 0)).size == virtqueues.MAX_QUEUE_SIZE
        assert (await new_vq(device, 1)).size == 4
        await device.reset()
        for vq in list(device.virtqueues.values()):
            await free_vq(vq)
        await device.start()
        await device.negotiate(0)
        assert (await new_vq(device, 0, size=512)).size == 512
        assert transport.device.queues[0].size == 512


async def test_queues_that_do_not_exist() -> None:
    async with started() as (device, _):
        with pytest.raises(LookupError, match="has no control_receiveq"):
            await new_vq(device, "control_receiveq")
        with pytest.raises(LookupError, match="no queue 'requestq'"):
            await new_vq(device, "requestq")
        await new_vq(device, "receiveq0")
        with pytest.raises(ValueError, match="queue 0 is in use"):
            await new_vq(device, 0)


async def test_a_size_that_no_split_queue_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def three(index: int) -> int:
        await trio.lowlevel.checkpoint()
        return 3

    async with started() as (device, transport):
        monkeypatch.setattr(transport, "queue_max_size", three)
        with pytest.raises(DeviceBroken, match=r"queue_size 0x3 of queue 0: .* no power of two") as caught:
            await new_vq(device, 0)
        assert caught.value.rule == "CC8"


async def test_free_one_queue_of_a_live_device() -> None:
    """RING_RESET: the device lets go of one queue, whose buffers come back, and goes on with the other (2.6.1)."""
    async with started() as (device, transport):
        waiter = Waiter()
        vq, other = await new_vq(device, 0, waiter), await new_vq(device, 1)
        await device.ready()
        buffer = device.memory.alloc(8)
        buffer.view[:1] = b"?"
        vq.add_buf([(buffer.address, 1)], 1, 0, "kept")
        vq.kick()
        while not vars(transport.device)["kept"]:
            await trio.sleep(0.001)
        assert await free_vq(vq) == ["kept"]
        assert list(device.virtqueues.values()) == [other]
        vars(transport.device)["kept"][0].complete()  # too late: nothing comes of it
        again = await new_vq(device, 0, waiter)
        buffer.view[:1] = b"x"
        again.add_buf([(buffer.address, 1), (buffer.address + 4, 4)], 1, 1, "again")
        again.kick()
        while not waiter.used:
            await device.wait(waiter.lot)
        assert waiter.used == [("again", 1)]


async def test_without_ring_reset_only_a_reset_frees() -> None:
    async with Loopback(Echo()) as transport:
        device = VirtioDevice(transport, feature_mask=~(1 << 40))
        await device.start()
        await device.negotiate(0)
        vq = await new_vq(device, 0)
        await device.ready()
        with pytest.raises(RuntimeError, match="without RING_RESET"):
            await free_vq(vq)
        await device.reset()
        assert await free_vq(vq) == []


async def test_needs_reset_ends_every_wait() -> None:
    async with started() as (device, _):
        waiter = Waiter()
        vq = await new_vq(device, 0, waiter)
        await device.ready()
        buffer = device.memory.alloc(1)
        ends: list[str] = []

        async def wait() -> None:
            try:
                await wait_forever(device, waiter.lot)
            except DeviceBroken as error:
                ends.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            buffer.view[:] = b"!"
            vq.add_buf([(buffer.address, 1)], 1, 0, "bad")
            vq.kick()
        assert ends == ["console at loopback needs a reset (status 0x4f)"] * 3
        with pytest.raises(DeviceBroken):
            await device.wait(waiter.lot)
        # And a reset heals it.
        await device.reset()
        await free_vq(vq)
        await device.start()
        assert device.broken is None
        assert await device.negotiate(0)


async def test_a_reset_ends_every_wait() -> None:
    async with started() as (device, _):
        lot = trio.lowlevel.ParkingLot()
        await device.ready()

        async def wait() -> None:
            with pytest.raises(DeviceGone, match="has been reset"):
                await device.wait(lot)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await device.reset()
        with pytest.raises(DeviceGone):
            await device.wait(lot)


async def test_nothing_is_kept_of_a_wait_that_has_ended() -> None:
    async with started() as (device, _):
        await device.ready()
        woken, cancelled, scope = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot(), trio.CancelScope()

        async def wait(lot: trio.lowlevel.ParkingLot) -> None:
            with scope:
                await device.wait(lot)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.wait, woken)
            nursery.start_soon(device.wait, woken)
            nursery.start_soon(wait, cancelled)
            await trio.testing.wait_all_tasks_blocked()
            woken.unpark_all()
            scope.cancel()
        kept = [weakref.ref(lot) for lot in (woken, cancelled)]
        del woken, cancelled
        gc.collect()
        assert [lot() for lot in kept] == [None, None]


async def test_a_used_ring_that_cannot_be_ends_every_wait() -> None:
    async with started() as (device, transport):
        waiter = Waiter()
        vq = await new_vq(device, 0, waiter)
        await device.ready()
        transport.memory.at(vq.device + 2, 2)[:] = b"\x05\x00"
        transport.queue_interrupt(0)
        with pytest.raises(DeviceBroken, match=r"receiveq0: used.idx is 0x5: only 0x0 .* \[2.7.8\]") as caught:
            await wait_forever(device, waiter.lot)
        assert caught.value.rule == "2.7.8"


async def test_configuration_changes() -> None:
    async with started() as (device, transport):
        await device.ready()
        changed = trio.Event()
        device.on_config = changed.set
        lot = trio.lowlevel.ParkingLot()
        assert await device.config.get("cols") == 80
        transport.device.config.update(cols=100)
        await changed.wait()
        await device.wait(lot)  # looks at the status, finds nothing bad, and lets its caller look again
        assert await device.config.get("cols") == 100
        assert device.broken is None


async def test_a_reset_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as (device, transport):
        monkeypatch.setattr(device_module, "RESET_TIMEOUT", 0.01)

        async def ignore(value: int) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(transport, "write_status", ignore)
        with pytest.raises(DeviceBroken, match="device_status is still 0xb") as caught:
            await device.reset()
        assert caught.value.rule == "RS1"


async def test_status_bits_are_only_added() -> None:
    async with started() as (device, _):
        await device.add_status(128)
        assert await device.read_status() == 1 | 2 | 8 | 128
