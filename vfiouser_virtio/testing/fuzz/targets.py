"""Devices that are fuzzed, and the request by which each shows that it still works."""

import os
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from construct import Int8ul, Struct

from vfiouser_virtio import devices
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio import blk, console, net
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, RequestShape
from vfiouser_virtio.protocols.virtio.device_types import declared_types
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG  # any flat structure does for a configuration
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.net_hub import hub_net, hub_net_works
from vfiouser_virtio.testing.fuzz.net_loop import looped_net, looped_net_works
from vfiouser_virtio.testing.fuzz.net_requests import NET_REQUESTS
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.virtio import Device, Queue, queue
from vfiouser_virtio.virtio.options import Size

DISK_SIZE = 1 << 20
_MOST = 64 << 10


# What `Echo` is asked: its first byte says how to be.
ECHO = DeviceType(
    "echo",
    COMMON_CFG,
    requests=(
        RequestShape(
            queues=(0, 1),
            header=Struct("how" / Int8ul),
            usual={"how": b"SCe"},
            payload=(0, 1, 64, 600),
            writable=(0, 1, 64, 1000, 5000),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """Device under test; add yours to `TARGETS`."""

    make: Callable[[], Device]
    """A new device."""
    works: Callable[[FuzzDriver], Awaitable[None]]
    """One good request, right after `FuzzDriver.bring_up`. Raises Found when its outcome is wrong."""
    type: DeviceType = ECHO
    """What its requests look like, and which queues may keep buffers for as long as they like."""

    def keeps(self, index: int, features: int) -> bool:
        """Whether a queue may keep buffers (console input), with these features."""
        return self.type.keeps_buffers(index, features)


_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is that folder which is meant


class Echo(Device):
    """Copies what is readable to what is writable; first S makes it slow, with pinned buffers, C changes its config."""

    device_id = 63
    driver_writes = frozenset({"queue_size", "queue_desc"})
    requestq = queue(max_size=64)
    otherq = queue(max_size=16)

    def __init__(self) -> None:
        super().__init__(config=record(COMMON_CFG)(queue_size=3))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for one in self.queues:
                nursery.start_soon(self._serve, one)

    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            room = chain.writable.length
            data = chain.readable.read(min(chain.readable.length, room, _MOST))
            if data[:1] == b"S":
                with requests.pinned(chain) as pinned:
                    await trio.sleep(0.02)
                if pinned.revoked:
                    chain.complete(0)
                    continue
            elif data[:1] == b"C":
                self.config.update(queue_enable=data[-1])
            chain.writable.write(data)
            chain.complete()


async def _echo_works(driver: FuzzDriver) -> None:
    length, data = await driver.request(0, [b"pi", b"ng"], [2, 6])
    if (length, data[:4]) != (4, b"ping"):
        raise Found("broken", f"echo answers {length} bytes, {data.hex()}", "request")


async def exercised(kind: DeviceType, driver: FuzzDriver) -> None:
    """The request of the type's declaration."""
    exercise = kind.exercise
    assert exercise is not None, kind.name
    room = [exercise.writable] if exercise.writable else []
    length, data = await driver.request(exercise.queue, [exercise.readable] if exercise.readable else [], room)
    if complaint := exercise.complaint(data, length):
        raise Found("broken", f"{kind.name}: {complaint}", "request")


async def _blk_works(driver: FuzzDriver) -> None:
    content = os.urandom(blk.SECTOR_SIZE)
    for kind, out, in_, expected in (
        (blk.RequestType.OUT, [content], [1], b"\0"),
        (blk.RequestType.IN, [], [blk.SECTOR_SIZE, 1], content + b"\0"),
    ):
        header = blk.REQUEST_HEADER_CODEC.pack(kind, 0, 7)
        _, data = await driver.request(0, [header, *out], in_)
        if data != expected:
            raise Found("broken", f"blk: {kind.name} has status {data[-1]:#x}, or other data", "request")


class _Echo:
    """A `backends.chardev.Chardev` that sends back what it gets, as far as it has room."""

    connected = True
    size: tuple[int, int] | None = (80, 24)

    def __init__(self) -> None:
        self.on_connect: Callable[[bool], None] = lambda _: None
        self.on_resize: Callable[[int, int], None] = lambda _cols, _rows: None
        self._bytes: deque[bytes] = deque(maxlen=16)
        self._arrived = trio.lowlevel.ParkingLot()

    def describe(self) -> str:
        return "loopback"

    async def run(self) -> None:
        await trio.sleep_forever()

    async def receive(self) -> bytes:
        while not self._bytes:
            await self._arrived.park()
        return self._bytes.popleft()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.send_nowait(data)

    def send_nowait(self, data: bytes) -> None:
        if data:
            self._bytes.append(data[:4096])
            self._arrived.unpark_all()

    def close(self) -> None:
        pass


def _disk_in_a_file() -> Device:
    """In memory, where the host has that: a flush took a minute on a disk that others kept busy."""
    in_memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        path = Path(folder, "disk")
        path.write_bytes(bytes(DISK_SIZE))
        return _with_small_queues(Blk(path=path, num_queues=1, serial="in a file"))


def _with_small_queues(device: Device) -> Device:
    device.resize_queues(64)
    return device


def _target(kind: DeviceType, make: Callable[[], Device] | None = None) -> FuzzTarget:
    return FuzzTarget(make or partial(devices.example, kind.name), partial(exercised, kind), kind)


_NET = net.TYPE._replace(requests=(*net.TYPE.requests, *NET_REQUESTS))

TARGETS: dict[str, FuzzTarget] = {
    "echo": FuzzTarget(Echo, _echo_works),
    **{kind.name: _target(kind) for kind in declared_types()},
    # Types that cannot be made without options, or are to be asked more than their declaration says.
    "blk": FuzzTarget(lambda: _with_small_queues(Blk(size=Size(DISK_SIZE), num_queues=2)), _blk_works, blk.TYPE),
    "blk-file": FuzzTarget(_disk_in_a_file, _blk_works, blk.TYPE),
    "net": FuzzTarget(looped_net, looped_net_works, _NET),
    "net-hub": FuzzTarget(hub_net, hub_net_works, _NET),
    "console": _target(console.TYPE, lambda: Console(chardev=[_Echo(), _Echo()], name=["", "second"])),
}
"""By the name that a case has: every declared type, and variants."""
