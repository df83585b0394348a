"""A block device's size and configuration."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.blk_device import GET_ID, IN, IOERR, OK, SECTORS, SIZE, both_memories, header, status

from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.blk_requests import Planner
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio.options import Size

# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", ["file", "ram"])
async def test_resize(image: Path, medium: str) -> None:
    device = Blk(path=image) if medium == "file" else Blk(size=Size(SIZE))
    async with running(device) as driver:
        generation = driver.core.read_generation()
        await device.resize(2 * SIZE)
        assert driver.config_interrupts == 1
        assert driver.config(0, 8) == 2 * SECTORS
        assert driver.core.read_generation() != generation
        used = await driver.request([header(IN, 2 * SECTORS - 1)], [512, 1])
        assert (status(used), used.data[0]) == (OK, bytes(512))
        await device.resize(SIZE // 2)
        assert status(await driver.request([header(IN, SECTORS - 1)], [512, 1])) == IOERR
        with pytest.raises(DeviceError):
            await device.resize(1000)
    if medium == "file":
        assert image.stat().st_size == SIZE // 2


async def test_a_look_at_the_size_does_not_take_back_a_resize() -> None:
    looking, go_on = trio.Event(), trio.Event()

    class Slow(RamBackend):
        async def refresh(self) -> int:
            size = self.size
            looking.set()
            await go_on.wait()
            return size

    device = Blk(backend=Slow(SIZE))
    async with running(device) as driver, trio.open_nursery() as nursery:
        await looking.wait()
        nursery.start_soon(device.resize, 2 * SIZE)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await driver.wait_config_interrupt()
        await trio.testing.wait_all_tasks_blocked()
        assert driver.config(0, 8) == 2 * SECTORS


async def test_a_file_that_grows_is_noticed(image: Path) -> None:
    async with running(Blk(path=image, logical_block_size=4096)) as driver:
        await trio.testing.wait_all_tasks_blocked()
        os.truncate(image, 2 * SIZE + 1000)
        await driver.wait_config_interrupt()
        assert driver.config(0, 8) == 2 * SECTORS


# ---- configuration -------------------------------------------------------------------------------------------------


def test_configuration() -> None:
    device = Blk(
        size=Size(SIZE),
        num_queues=3,
        logical_block_size=1024,
        physical_block_size=4096,
        min_io_size=Size(4096),
        opt_io_size=Size(65536),
        size_max=Size(8192),
    )
    config = device.config
    assert [config[name] for name in ("capacity", "blk_size", "physical_block_exp")] == [SECTORS, 1024, 2]
    assert [config[name] for name in ("min_io_size", "opt_io_size", "num_queues")] == [4, 64, 3]
    assert [config[name] for name in ("seg_max", "size_max", "wce")] == [254, 8192, 1]
    assert [config[name] for name in ("unused", "unused1", "zoned_unused2")] == [0, bytes(3), bytes(3)]
    assert [queue.max_size for queue in device.queues] == [256] * 3
    assert device.features & BlkFeature.MQ.mask
    assert device.features & BlkFeature.SIZE_MAX.mask
    assert device.features & BlkFeature.FLUSH.mask
    assert device.features & BlkFeature.CONFIG_WCE.mask
    assert device.config.size == 96
    assert device.driver_writes <= blk.Config().offsets.keys()
    device.close()


@pytest.mark.parametrize(("size", "seg_max"), [(1, 1), (3, 1), (64, 62), (32768, 1022)])
def test_the_queue_size_limits_a_request(size: int, seg_max: int) -> None:
    device = Blk(size=Size(SIZE), num_queues=2)
    device.resize_queues(size)
    assert device.config["seg_max"] == seg_max
    chosen = Blk(size=Size(SIZE), seg_max=7)
    chosen.resize_queues(size)
    assert chosen.config["seg_max"] == 7


def test_without_discard(image: Path) -> None:
    device = Blk(path=image, discard=False)
    assert not device.features & BlkFeature.DISCARD.mask
    assert device.features & BlkFeature.WRITE_ZEROES.mask
    assert device.config["write_zeroes_may_unmap"] == 0
    device.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path=FILE or size=SIZE"),
        ({"path": Path("x"), "size": SIZE}, "only one"),
        ({"path": Path("/nonexistent")}, "no such file: /nonexistent"),
        ({"size": 1000}, "truncate -s 1024"),
        ({"size": 0}, "RAM disk"),
        ({"size": SIZE, "num_queues": 0}, "num-queues"),
        ({"size": SIZE, "logical_block_size": 256}, "logical-block-size"),
        ({"size": SIZE, "logical_block_size": 4096, "physical_block_size": 512}, "physical-block-size"),
        ({"size": SIZE, "serial": "x" * 21}, "serial"),
        ({"size": SIZE, "min_io_size": 1 << 40}, "min_io_size"),
        ({"size": SIZE, "seg_max": -1}, "seg_max"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        Blk(**options)  # as a user could write them
    assert "\n" not in str(caught.value)


def test_a_failed_device_leaves_the_image_alone(image: Path) -> None:
    os.truncate(image, 1000)
    with pytest.raises(DeviceError, match="truncate -s 1024"):
        Blk(path=image)
    os.truncate(image, 1024)
    first = Blk(path=image)
    with pytest.raises(DeviceError, match="in use"):
        Blk(path=image)
    first.close()
    FileBackend(image).close()


@both_memories
@pytest.mark.parametrize("event", ["another region", "ram away for a moment"])
async def test_the_map_changes_between_two_chains_of_a_burst(
    private: bool, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU changes the map whenever it likes; chains that were taken already are served all the same."""
    async with running(Blk(size=Size(SIZE), serial="x"), private=private) as driver:
        assert isinstance(driver.device, Blk)
        plan = Planner.plan

        def plan_then_change(planner: Planner, request: Any) -> Any:
            monkeypatch.setattr(Planner, "plan", plan)
            if event == "another region":
                driver.memory.map(0x1_0000_0000, 4096, readable=True, writable=True, fd=None, offset=0)
            else:
                driver.ram.unmap()
                driver.ram.map()
            return plan(planner, request)

        monkeypatch.setattr(Planner, "plan", plan_then_change)
        tokens = [driver.add(0, [header(GET_ID)], [20, 1]) for _ in range(3)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
