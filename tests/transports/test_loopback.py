"""The loopback as a transport: what its driver sees, beside what the device's own tests see of it."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.guest import wait_forever

from vfiouser_virtio.guest import DeviceBroken, DriverVirtqueue, Transport, VirtioDevice, new_vq
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.protocols.virtio import console
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Device, queue


class Echo(Device):
    device_id = 3
    driver_writes = frozenset({"emerg_wr"})
    requestq = queue(max_size=16)
    otherq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__(config=console.Config(cols=80, rows=24), features=1 << 69)
        self.written: list[tuple[str, int | bytes]] = []
        self.closed = False

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()

    def config_written(self, field: str, value: int | bytes) -> None:
        self.written.append((field, value))

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def loopback(*, private: bool = False) -> AsyncIterator[Loopback]:
    with trio.fail_after(60):
        async with Loopback(Echo(), private=private) as transport:
            yield transport


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_has_the_shape_of_a_transport() -> None:
    """Neither package imports the other: this assignment is what a type checker compares."""
    transport: Transport = Loopback(Echo(), memory_size=4096)
    assert transport.num_queues == 2


@pytest.mark.parametrize(
    ("style", "numbers"),
    [
        ("default", (0x1AF4, 0x1043, 0x5000, 0x1043, 0x078000)),
        ("2007", (0x5000, 0x1043, 0x5000, 0x1043, 0x078000)),
        ("qemu", (0x1AF4, 0x1043, 0x1AF4, 0x1100, 0x078000)),
        (Identity(1, 2, 3, 4, 0x050607, 8), (1, 2, 3, 4, 0x050607)),
    ],
)
def test_ids_are_those_of_pci(style: Style | Identity, numbers: tuple[int, ...]) -> None:
    ids = Loopback(Echo(), ids=style, memory_size=4096).ids
    assert (ids.vendor, ids.device, ids.subsystem_vendor, ids.subsystem, ids.class_code) == numbers
    assert ids.virtio_id == 3


async def test_features_status_and_configuration() -> None:
    async with loopback() as transport:
        assert await transport.read_features() == 1 << 69 | 1 << 40 | 1 << 32 | 1 << 29 | 1 << 28
        await transport.write_features(1 << 69 | 1 << 32)
        await transport.write_status(11)
        assert await transport.read_status() == 11
        assert transport.device.driver_features == 1 << 69 | 1 << 32
        assert await transport.read_config(0, 4) == b"\x50\0\x18\0"
        before = await transport.read_generation()
        assert await transport.read_generation() == before
        transport.device.config.update(cols=81)
        assert await transport.read_generation() != before
        await transport.write_config(0, b"\xff\xff")  # read-only for the driver
        await transport.write_config(8, b"a\0\0\0")
        assert await transport.read_config(0, 1) == b"\x51"
        assert vars(transport.device)["written"] == [("emerg_wr", ord("a"))]
        await transport.write_status(0)
        assert await transport.read_status() == 0


async def test_queues() -> None:
    async with loopback() as transport:
        assert [await transport.queue_max_size(index) for index in range(3)] == [16, 8, 0]


@pytest.mark.parametrize("size", [0, 3, 32])
async def test_a_queue_size_that_cannot_be(size: int) -> None:
    async with loopback() as transport:
        device = VirtioDevice(transport)
        await device.start()
        await device.negotiate(0)
        area = transport.memory.alloc(4096, 4096).address
        await transport.enable_queue(0, size, area, area + 0x800, area + 0xC00)
        assert not transport.core.queues[0].enabled
        assert await device.read_status() & 64


@pytest.mark.parametrize("private", [False, True])
async def test_requests_in_both_kinds_of_memory(private: bool) -> None:
    async with loopback(private=private) as transport:
        used: list[tuple[int, int]] = []
        lot = trio.lowlevel.ParkingLot()

        def callback(vq: DriverVirtqueue) -> bool:
            while got := vq.get_buf():
                used.append(got)
            lot.unpark_all()
            return True

        device = VirtioDevice(transport)
        await device.start()
        await device.negotiate(0)
        vq = await new_vq(device, 0, callback)
        await device.ready()
        buffers = []
        for number in range(100):
            buffer = transport.memory.alloc(8)
            buffer.view[:4] = number.to_bytes(4, "big")
            buffers.append(buffer)
            while not vq.num_free:
                await device.wait(lot)
            vq.add_buf([(buffer.address, 4), (buffer.address + 4, 4)], 1, 1, number)
            vq.kick()
        while len(used) < 100:
            await device.wait(lot)
        assert used == [(number, 4) for number in range(100)]
        assert all(bytes(buffer.view) == number.to_bytes(4, "big") * 2 for number, buffer in enumerate(buffers))


async def test_interrupts_come_from_a_task_of_their_own() -> None:
    """Inside of a callback the driver may do whatever it likes to the device: nothing of that runs at once."""
    async with loopback() as transport:
        log: list[str] = []

        def on_queue(index: int) -> None:
            log.append(f"queue {index}")
            if log.count("queue 1") < 3:
                transport.queue_interrupt(1)
                log.append("raised")

        await transport.connect_interrupts(on_queue, lambda: log.append("config"))
        transport.queue_interrupt(1)
        transport.queue_interrupt(1)
        transport.config_interrupt()
        assert log == []
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["queue 1", "raised", "config", "queue 1", "raised", "queue 1"]
        await transport.disconnect_interrupts()
        transport.queue_interrupt(0)
        transport.config_interrupt()
        await trio.testing.wait_all_tasks_blocked()
        assert len(log) == 6


async def test_nothing_is_left_behind() -> None:
    before = open_fds()
    async with loopback() as transport:
        pass
    assert open_fds() == before
    assert vars(transport.device)["closed"]


async def test_an_exception_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Loopback(Echo()):
            raise KeyError("mine")


async def test_a_bug_of_the_device_is_needs_reset_and_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(Echo):
        async def run(self) -> None:
            raise ZeroDivisionError("a bug")

    with trio.fail_after(60):
        async with Loopback(Buggy()) as transport:
            device = VirtioDevice(transport)
            await device.start()
            await device.negotiate(0)
            lot = trio.lowlevel.ParkingLot()
            await device.ready()
            with pytest.raises(DeviceBroken, match="needs a reset"):
                await wait_forever(device, lot)
    assert "a bug in the device" in caplog.text


async def test_what_its_memory_has_to_say_begins_with_the_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vfiouser_virtio.memory")
    async with loopback() as transport:
        transport.core.log.warning("another")
    of_memory, another = [record.getMessage() for record in caplog.records][:2]
    assert of_memory.startswith("echo at loopback: client maps memory")
    assert another == "echo at loopback: another"
