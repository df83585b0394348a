"""`DeviceCore.replace`: another device object takes over while the driver is at work, which notices nothing."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.dma import PrivateMemory, SharedMemory
from vfiouser_virtio.errors import AuthorError, DeviceError
from vfiouser_virtio.guest import VirtioDevice, bound
from vfiouser_virtio.guest.binding import bound_pci
from vfiouser_virtio.testing.driver import DRIVER_OK, running
from vfiouser_virtio.testing.served import served
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.vfio_user import connect
from vfiouser_virtio.virtio import Chain, Device, DeviceCore, Offer, queue

PATIENCE = 60.0
SECTORS = 2048


@asynccontextmanager
async def driven(device: Device, carrier: str, **offer: Any) -> AsyncIterator[tuple[DeviceCore, VirtioDevice]]:
    """A device's core, and the driver's side of it."""
    private = carrier.endswith("private")
    with trio.fail_after(PATIENCE):
        if carrier.startswith("loopback"):
            async with Loopback(device, private=private, offer=Offer(**offer)) as loopback, bound(loopback) as found:
                yield loopback.core, found
        else:
            with PrivateMemory(16 << 20) if private else SharedMemory(16 << 20) as memory:
                async with (
                    served(device, offer=Offer(**offer)) as at,
                    connect(at.path, memory=[memory]) as client,
                    bound_pci(client) as found,
                ):
                    yield at.function.core, found


async def swap(disk: Any, number: int, done: list[int]) -> None:
    """Write, read and reverse one place of the disk, over and over: each of these is lost or doubled with effect."""
    content = bytes([number]) * 512 + bytes(range(256)) * 4
    for _ in range(12):
        await disk.write(8 * number, content)
        assert await disk.read(8 * number, 3) == content
        content = content[::-1]
        done[number] += 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carrier", ["loopback", "loopback-private", "socket", "socket-private"])
async def test_a_disk_is_replaced_under_load(
    carrier: str, packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTORS * 512))
    backend = FileBackend(image)  # which is locked, and goes from one to the next
    devices: list[Blk] = []

    def make() -> Blk:
        devices.append(Blk(backend=backend, num_queues=2, delay=0.002 if len(devices) % 2 else None))
        return devices[-1]

    tasks, done = 8, [0] * 8
    async with driven(make(), carrier, packed=packed) as (core, found):
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(swap, found.driver_data, number, done)
            for each in range(6):
                while sum(done) < 12 * each:
                    await trio.sleep(0.001)
                await core.replace(make())
        assert done == [12] * tasks
        assert core.device is devices[-1]
        assert len(devices) == 7
    if carrier.endswith("private"):
        assert all("no file descriptor" in record.message for record in caplog.records)
    else:
        assert not caplog.records


# ---- what the device has at the moment -------------------------------------------------------------------------------


class Keeper(Device):
    """Keeps what it gets."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            self.kept.append(chain)


class Echo(Keeper):
    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()


@pytest.mark.parametrize("private", [False, True])
async def test_what_it_has_is_offered_again(private: bool) -> None:
    keeper, echo = Keeper(), Echo()
    async with running(keeper, private=private) as driver:
        tokens = [driver.add(0, [b"%d" % number], [4]) for number in (3, 1, 2)]
        driver.kick(0)
        while len(keeper.kept) < 3:
            await trio.sleep(0.001)
        keeper.kept[0].writable.write(b"half")
        await driver.core.replace(echo)
        answers = [await driver.wait(0, token) for token in tokens]
        assert [answer.data[0][:1] for answer in answers] == [b"3", b"1", b"2"]
        assert [answer.written for answer in answers] == [1, 1, 1]
        # Whatever is left of the old one: it has no buffers any more, and nothing to say.
        for chain in keeper.kept:
            assert chain.readable.length == 0
            chain.complete()
        assert keeper.requestq.next_nowait() is None
        assert (await driver.request([b"4"], [1])).data == [b"4"]
        await driver.reset()
        driver.probe()
        assert (await driver.request([b"5"], [1])).data == [b"5"]


async def test_its_run_ends_and_completes_nothing() -> None:
    """A device that completes its requests with an error when it is cancelled, as a disk does at a reset."""

    class Cancelled(Keeper):
        async def run(self) -> None:
            async for chain in self.requestq:
                self.kept.append(chain)
                try:
                    await trio.sleep_forever()
                finally:
                    chain.writable.write(b"lost")
                    chain.complete()

    device = Cancelled()
    async with running(device) as driver:
        token = driver.add(0, [b"text"], [4])
        driver.kick(0)
        while not device.kept:
            await trio.sleep(0.001)
        await driver.core.replace(Echo())
        assert (await driver.wait(0, token)).data == [b"text"]


async def test_before_driver_ok_and_after_a_reset() -> None:
    async with running(Keeper(), probe=False) as driver:
        await driver.core.replace(Echo())
        driver.probe()
        assert (await driver.request([b"1"], [1])).data == [b"1"]
        await driver.reset()
        await driver.core.replace(Echo())
        driver.probe()
        assert (await driver.request([b"2"], [1])).data == [b"2"]


async def test_while_it_is_suspended() -> None:
    async with running(Echo(), offer=Offer(suspend=True)) as driver:
        assert (await driver.request([b"1"], [1])).data == [b"1"]
        running_status = driver.status
        driver.core.write_status(running_status | 16)
        while driver.status & DRIVER_OK:
            await trio.sleep(0.001)
        await driver.core.replace(Echo())
        token = driver.add(0, [b"2"], [1])
        driver.core.notify_queue(0)
        await trio.testing.wait_all_tasks_blocked()
        assert not driver.is_used(0, token)
        driver.core.write_status(driver.status | DRIVER_OK)
        assert (await driver.wait(0, token)).data == [b"2"]


class Pinning(Keeper):
    """Never lets go of a buffer until it is told."""

    async def run(self) -> None:
        async for chain in self.requestq:
            self.kept.append(chain)
            self.release = self.requestq.hold(chain, lambda: None)


async def test_requests_that_do_not_end(autojump_clock: trio.testing.MockClock) -> None:
    device = Pinning()
    async with running(device) as driver:
        token = driver.add(0, [b"text"], [4])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(DeviceError, match=r"requests still use guest memory after 5 s"):
            await driver.core.replace(Echo())
        assert driver.core.device is device
        device.kept[0].complete(0)
        device.release()
        assert (await driver.wait(0, token)).written == 0
        await driver.core.replace(Echo())
        assert (await driver.request([b"1"], [1])).data == [b"1"]


async def test_a_reset_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    device = Pinning()
    async with running(device) as driver, trio.open_nursery() as nursery:
        driver.add(0, [b"text"], [4])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(driver.core.replace, Echo())
        await trio.testing.wait_all_tasks_blocked()
        hold = driver.core.write_status(0)
        assert hold is not None
        await trio.sleep(1)
        device.release()
        assert driver.status == 0
        driver.rings = []
        driver.probe()
        assert (await driver.request([b"1"], [1])).data == [b"1"]


# ---- what does not fit -----------------------------------------------------------------------------------------------


class Larger(Echo):
    otherq = queue(max_size=8)


class Refusing(Echo):
    def features_ok(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Rng, "is of type 4, not 63"),
        (Larger, r"has queues of \[8, 8\] entries, not of \[8\]"),
        (Refusing, "refuses"),
    ],
)
async def test_what_cannot_take_over(make: Callable[[], Device], words: str) -> None:
    device = Echo()
    async with running(device) as driver:
        with pytest.raises(AuthorError, match=words):
            await driver.core.replace(make())
        with pytest.raises(AuthorError, match="is the device that it would take over from"):
            await driver.core.replace(device)
        assert (await driver.request([b"1"], [1])).data == [b"1"]


async def test_features_that_were_accepted_must_be_offered() -> None:
    async with running(Blk(size=1 << 20)) as driver:
        with pytest.raises(AuthorError, match="does not offer the feature bits 0x2000"):
            await driver.core.replace(Blk(size=1 << 20, discard=False))


# ---- what the driver had told the device -----------------------------------------------------------------------------


async def test_the_write_cache_stays_off() -> None:
    async with running(Blk(size=1 << 20)) as driver:
        driver.core.write_config(32, b"\0")
        await driver.core.replace(Blk(size=1 << 20))
        assert driver.config(32, 1) == 0
        interrupts = driver.config_interrupts
        await driver.core.replace(Blk(size=2 << 20))
        assert driver.config(0, 8) == 4096
        assert driver.config_interrupts == interrupts + 1


async def test_ports_stay_open(tmp_path: Path) -> None:
    def make(number: int) -> Console:
        return Console(chardev=[f"file:{tmp_path / str(number)}", "null"], name=["org.example"])

    async with driven(make(0), "loopback") as (core, found):
        port = found.driver_data.ports[0]
        await port.send(b"one")
        before = core.device
        await core.replace(make(1))
        before.close()
        await port.send(b"two")
        while not (tmp_path / "1").read_bytes():
            await trio.sleep(0.001)
    assert [(tmp_path / str(number)).read_bytes() for number in range(2)] == [b"one", b"two"]
