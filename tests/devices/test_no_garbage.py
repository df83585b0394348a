"""Requests, configuration, resets and mistakes of drivers leave nothing for Python's collector, whatever the device."""

import logging
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.core_device import both_memories
from support.garbage import check_no_garbage, until_3_11
from support.net_sink import Sink

from vfiouser_virtio import devices
from vfiouser_virtio.backends.block import Segments
from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Does, Netdev
from vfiouser_virtio.backends.net.nic import Nic
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.backends.net.shaping import Shaped
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.backends.workers import Workers
from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import DeviceError, GuestError
from vfiouser_virtio.guest.drivers.blk import Disk, RequestFailed
from vfiouser_virtio.guest.drivers.console import ConsolePorts
from vfiouser_virtio.guest.drivers.input import InputEvents
from vfiouser_virtio.guest.drivers.net import NetInterface
from vfiouser_virtio.protocols.virtio.blk import BlkStatus
from vfiouser_virtio.protocols.virtio.input import Ev, Led, Select
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags
from vfiouser_virtio.testing.carriers import Carrier, carry
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.virtio import Device, Limits, queue

NOWHERE = 0xDEAD_0000
MIB = 1 << 20
over_carriers = pytest.mark.parametrize("carrier", ["loopback", "socket", "socket-private"])
Turn = Callable[[], Awaitable[object]]


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What is logged is kept for the report of a test, with its exceptions."""
    logger = logging.getLogger("vfiouser_virtio")
    logger.propagate = False
    yield
    logger.propagate = True


# ---- all types ------------------------------------------------------------------------------------------------------


def requests_of(kind: str, driver: Any) -> Turn:
    """What a driver of each type asks for."""

    async def blk(disk: Disk) -> None:
        await disk.write(0, bytes(4096))
        await disk.read(0, 8)
        await disk.flush()
        await disk.get_id()
        with pytest.raises(RequestFailed):
            await disk.read(1 << 40, 1)

    async def balloon(balloon: Any) -> None:
        await balloon.send("inflateq", range(300, 310))
        await balloon.send("deflateq", range(300, 310))
        await balloon.device.config.set("actual", 10)

    async def console(console: ConsolePorts) -> None:
        await console.ports[0].send(b"hello\n")

    async def keyboard(events: InputEvents) -> None:
        await events.tell(Ev.LED, Led.CAPSL, 1)
        await events.select(Select.ID_DEVIDS)
        await events.select(Select.ABS_INFO)

    async def net(interface: NetInterface) -> None:
        await interface.send(b"\xff" * 6 + interface.mac + bytes(50))
        await interface.set_rx_mode(0, True)
        await interface.set_addresses([interface.mac])
        await interface.control(99, 99)

    async def rng(source: Any) -> None:
        await source.read(64)

    made: dict[str, Callable[[Any], Awaitable[None]]] = {
        "blk": blk,
        "balloon": balloon,
        "console": console,
        "input": keyboard,
        "net": net,
        "rng": rng,
    }
    return partial(made[kind], driver)


@over_carriers
@pytest.mark.parametrize("kind", devices.SHIPPED)
async def test_requests(kind: str, carrier: Carrier) -> None:
    async with carry(devices.example(kind), carrier) as device:
        await check_no_garbage(requests_of(kind, device.driver_data), 30)


@until_3_11
@both_memories
@pytest.mark.parametrize("kind", devices.SHIPPED)
async def test_buffers_that_are_no_memory(kind: str, private: bool) -> None:
    async with running(devices.example(kind), private=private) as driver:
        for index in range(len(driver.core.queues)):
            for flags in (0, WRITE):

                async def turn(index: int = index, flags: int = flags) -> None:
                    driver.add_raw(index, [(NOWHERE, 16, flags)])
                    driver.kick(index)
                    await trio.testing.wait_all_tasks_blocked()
                    await driver.reset()
                    driver.probe()

                await check_no_garbage(turn, 20)


class Failing(Device):
    """Its run ends with an exception at the first request."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    async def run(self) -> None:
        async for _ in self.requestq:
            raise self.error("as it is meant to")


@both_memories
@pytest.mark.parametrize("error", [GuestError, ZeroDivisionError])
async def test_a_run_that_fails(error: type[Exception], private: bool) -> None:
    async with running(Failing(error), private=private) as driver:

        async def turn() -> None:
            driver.add(0, [b"x"], [1])
            driver.kick(0)
            await driver.wait_broken()
            await driver.reset()
            driver.probe()

        await check_no_garbage(turn, 30)


# ---- disks ----------------------------------------------------------------------------------------------------------


class Broken(RamBackend):
    """Disk that reads nothing, in the task of the request or in a thread."""

    def __init__(self, *, in_thread: bool) -> None:
        super().__init__(MIB)
        self.workers = Workers("broken") if in_thread else None

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return False

    async def read(self, offset: int, segments: Segments) -> None:
        if self.workers is None:
            await trio.lowlevel.checkpoint()
            self.fail()
        else:
            await self.workers.run(self.fail)

    def fail(self) -> None:
        raise OSError(5, "as it is meant to")

    def close(self) -> None:
        super().close()
        if self.workers is not None:
            self.workers.close()


@both_memories
@pytest.mark.parametrize("in_thread", [False, True])
async def test_requests_that_a_disk_fails(in_thread: bool, private: bool) -> None:
    async with running(Blk(backend=Broken(in_thread=in_thread)), private=private) as driver:

        async def turn() -> None:
            used = await driver.request([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
            assert used.data[1] == bytes([BlkStatus.IOERR])

        await check_no_garbage(turn)


BACKENDS: dict[str, dict[str, Any]] = {
    "io_uring": {"aio": "io_uring"},
    "threads": {"aio": "threads"},
    "inline": {"aio": "inline"},
    "direct": {"cache": "none"},
    "direct-threads": {"cache": "none", "aio": "threads"},
}


@over_carriers
@pytest.mark.parametrize("name", BACKENDS)
async def test_files(name: str, carrier: Carrier, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    try:
        made = Blk(path=path, **BACKENDS[name])
    except DeviceError as error:
        pytest.skip(str(error))  # a tmpfs of an old kernel
    async with carry(made, carrier) as device:
        disk: Disk = device.driver_data

        async def turn() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(disk.read, 8 * number, 8)
                    nursery.start_soon(disk.write, 8 * number, bytes(4096))
            await disk.flush()
            await disk.discard(0, 8)
            await disk.write_zeroes(0, 8)

        await check_no_garbage(turn, 30)


@until_3_11
async def test_limits() -> None:
    async with running(Blk(size=MIB), limits=Limits(iops=1_000_000)) as driver:

        async def turn() -> None:
            await driver.request([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
            await driver.reset()
            driver.probe()

        await check_no_garbage(turn)


# ---- networks and consoles ------------------------------------------------------------------------------------------


def netdevs(kind: str, folder: Path) -> tuple[Netdev, Netdev]:
    a, b = folder / "a", folder / "b"
    if kind == "hub":
        return HubNetdev(hub="garbage"), HubNetdev(hub="garbage")
    if kind == "stream":
        return StreamNetdev(addr__path=a, server=True), StreamNetdev(addr__path=a)
    if kind == "dgram":
        return DgramNetdev(local__path=a, remote__path=b), DgramNetdev(local__path=b, remote__path=a)
    if kind == "wire":
        one, other = WireNetdev.pair()
        return WireNetdev(one, "one"), WireNetdev(other, "other")
    ends = netdevs("wire", folder)
    if kind == "recorded":
        return RecordedNetdev(ends[0], dump=a), RecordedNetdev(ends[1], dump=b)
    return Shaped(ends[0], delay_ms=0.01), Shaped(ends[1], rate=1000)


@over_carriers
@pytest.mark.parametrize("kind", ["hub", "stream", "dgram", "wire", "recorded", "shaped"])
async def test_frames(kind: str, carrier: Carrier, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ends: list[NetInterface] = []
        for number, netdev in enumerate(netdevs(kind, tmp_path)):
            made = Net(mac=f"52:54:00:00:00:0{number}", netdev=netdev)
            ends.append((await stack.enter_async_context(carry(made, carrier))).driver_data)
        one, other = ends
        while not all([await each.link_is_up() for each in ends]):
            await trio.sleep(0.001)
        await trio.testing.wait_all_tasks_blocked()  # a device is on its network a moment after its driver is ready

        async def turn() -> None:
            await one.send(other.mac + one.mac + b"\x88\xb5" + bytes(50))
            await other.receive()
            for _ in range(5):
                other.post(one.mac + other.mac + b"\x88\xb5" + bytes(50))
            for _ in range(5):
                await one.receive()

        with trio.fail_after(60):
            await check_no_garbage(turn, 50)


@both_memories
async def test_frames_for_buffers_that_are_no_memory(private: bool) -> None:
    sender = HubNetdev(hub="garbage")
    async with running(Net(netdev=HubNetdev(hub="garbage")), private=private) as driver, background() as tasks:
        tasks.start_soon(sender.run, Sink())
        await trio.testing.wait_all_tasks_blocked()

        async def turn() -> None:
            driver.add_raw(0, [(NOWHERE, 2000, WRITE)])
            driver.kick(0)
            await trio.testing.wait_all_tasks_blocked()
            sender.put(frame_of(b"\xff" * 6 + b"\x52" * 6 + bytes(48)))
            await driver.wait_broken()
            await driver.reset()
            driver.probe()
            await trio.testing.wait_all_tasks_blocked()

        await check_no_garbage(turn, 20)


class Plain(NullNetdev):
    """Network that takes complete frames only."""

    does = Does(0)


async def test_packets_that_a_card_cannot_cut() -> None:
    nic = Nic(Plain(), DeviceLog(logging.getLogger("vfiouser_virtio.test"), "card"))
    bad = frame_of(bytes(60), Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 54, 0, 50, 16))

    async def turn() -> None:
        assert (await nic.send([bad]))[0] is not None

    await check_no_garbage(turn)


@over_carriers
async def test_a_console(carrier: Carrier) -> None:
    (chardev, stream), (second, second_end) = pair(), pair()
    made = Console(chardev=[chardev, second])
    async with stream, second_end, carry(made, carrier) as device:
        console: ConsolePorts = device.driver_data
        port = await console.wait_port(0)
        await port.open()
        sizes = cycle([(80, 25), (132, 43)])

        async def turn() -> None:
            await port.send(b"out")
            await stream.receive_some()
            await stream.send_all(b"in")
            await port.receive()
            size = next(sizes)
            made.resize(*size)
            await port.wait_for(lambda each: each.size == size)
            await port.close()
            await port.open()

        with trio.fail_after(60):
            await check_no_garbage(turn, 50)
