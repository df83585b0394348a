"""The write cache of a block device, and failures and delays of the host."""

import errno
import logging
import os
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from support.blk_device import (
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    SIZE,
    WRITE_ZEROES,
    Recorder,
    both_memories,
    header,
    segment,
    status,
)

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio.options import Duration, Size

# ---- the write cache (5.2.6.2) ---------------------------------------------------------------------------------------

WCE_OFFSET = 32


@pytest.mark.parametrize(
    ("features", "writeback", "stable"),
    [
        (BlkFeature.FLUSH.mask | BlkFeature.CONFIG_WCE.mask, True, False),
        (BlkFeature.FLUSH.mask | BlkFeature.CONFIG_WCE.mask, False, True),
        (BlkFeature.FLUSH.mask, True, False),
        (BlkFeature.FLUSH.mask, False, True),
        (BlkFeature.CONFIG_WCE.mask, True, True),
        (0, True, True),
    ],
)
@pytest.mark.parametrize("write", [[header(OUT), bytes(512)], [header(WRITE_ZEROES), segment(0, 1)]])
async def test_stable_writes_are_flushed(features: int, writeback: bool, stable: bool, write: list[bytes]) -> None:
    backend = Recorder()
    async with running(Blk(backend=backend, writeback=writeback), features=features) as driver:
        assert status(await driver.request(write, [1])) == OK
        assert (backend.calls[-1] == "flush") is stable
        backend.calls.clear()
        await driver.request([header(IN)], [512, 1])
        assert backend.calls == ["read"]
        await driver.request([header(FLUSH)], [1])
        assert backend.calls == ["read", "flush"]


async def test_the_driver_switches_the_cache() -> None:
    backend = Recorder()
    async with running(Blk(backend=backend)) as driver:
        for value, calls in ((0, ["write", "flush"]), (1, ["write"])):
            driver.core.write_config(WCE_OFFSET, bytes([value]))
            assert driver.config(WCE_OFFSET, 1) == value
            backend.calls.clear()
            assert status(await driver.request([header(OUT), bytes(512)], [1])) == OK
            assert backend.calls == calls
        driver.core.write_config(WCE_OFFSET, b"\0")
        await driver.reset()
        assert driver.config(WCE_OFFSET, 1) == 1
        assert not driver.config_interrupts


async def test_nothing_else_in_the_configuration_can_be_written() -> None:
    async with running(Blk(size=Size(SIZE)), features=BlkFeature.FLUSH.mask) as driver:
        before = driver.core.read_config(0, 96)
        driver.core.write_config(0, b"\xff" * 96)
        driver.core.write_config(WCE_OFFSET, b"\0")  # not negotiated
        assert driver.core.read_config(0, 96) == before


# ---- failures and delays of the host ---------------------------------------------------------------------------------


@both_memories
async def test_errors_of_the_host(private: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder()
    async with running(Blk(backend=backend), private=private) as driver:
        backend.fail = OSError(errno.EIO, "the disk is on fire")
        for out, room in (([header(IN, 8)], 512), ([header(OUT, 8), bytes(512)], 0), ([header(FLUSH)], 0)) * 2:
            used = await driver.request(out, [room, 1] if room else [1])
            assert (status(used), used.written) == (IOERR, 0 if room else 1)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 3
        assert "EIO" in errors[0]
        assert "IN at offset 0x1000" in errors[0]
        backend.fail = None
        assert status(await driver.request([header(IN)], [512, 1])) == OK


async def test_a_write_that_cannot_be_made_stable_fails() -> None:
    backend = Recorder()

    async def no_flush() -> None:
        raise OSError(errno.EIO, "no flush")

    backend.flush = no_flush  # one failure among operations that work
    async with running(Blk(backend=backend, writeback=False)) as driver:
        assert status(await driver.request([header(OUT), bytes(512)], [1])) == IOERR


@both_memories
async def test_a_cut_file_is_an_error_of_the_host(image: Path, private: bool) -> None:
    device = Blk(path=image)
    device.refresh = trio.lowlevel.checkpoint  # the watch must not be faster
    async with running(device, private=private) as driver:
        os.truncate(image, 512)
        used = await driver.request([header(IN, 0)], [1024, 1])
        assert (status(used), used.written) == (IOERR, 0)


async def test_a_slow_request_holds_up_nothing() -> None:
    """Others of its queue, of other queues and of other devices overtake it."""
    backend = Recorder()
    async with running(Blk(backend=backend, num_queues=2)) as slow, running(Blk(size=Size(SIZE))) as other:
        backend.gate = gate = trio.Event()
        stuck = [slow.add(queue, [header(IN)], [512, 1]) for queue in (0, 1) for _ in range(20)]
        slow.kick(0)
        slow.kick(1)
        await trio.testing.wait_all_tasks_blocked()
        backend.gate = None
        for queue in (0, 1):
            assert status(await slow.request([header(IN)], [512, 1], queue=queue)) == OK
            assert status(await slow.request([header(GET_ID)], [20, 1], queue=queue)) == OK
        assert status(await other.request([header(OUT), bytes(512)], [1])) == OK
        assert slow.core.read_config(0, 8) == struct.pack("<Q", SECTORS)
        assert not any(slow.is_used(number // 20, token) for number, token in enumerate(stuck))
        gate.set()
        for number, token in enumerate(stuck):
            assert status(await slow.wait(number // 20, token)) == OK


async def test_delay(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Blk(size=Size(SIZE), delay=Duration(2.0))) as driver:
        start = trio.current_time()
        tokens = [driver.add(0, [header(IN, number)], [512, 1]) for number in range(10)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
        assert 2.0 <= trio.current_time() - start < 2.5
