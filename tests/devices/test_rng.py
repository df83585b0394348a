"""The entropy device, through its ring."""

import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.rng import MAX_BYTES_PER_CHAIN, Rng
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio.options import Size

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])


@both_memories
async def test_every_buffer_is_filled_with_something_else(private: bool) -> None:
    async with running(Rng(), private=private) as driver:
        seen = set()
        for _ in range(20):
            used = await driver.request([], [64])
            assert used.written == 64
            seen.add(used.data[0])
        assert len(seen) == 20
        assert bytes(64) not in seen


@both_memories
async def test_a_buffer_in_pieces(private: bool) -> None:
    async with running(Rng(), private=private) as driver:
        used = await driver.request([b"ignored"], [1, 100, 31], indirect=True)
        assert used.written == 132
        assert used.data[1] != b"\xaa" * 100


@both_memories
async def test_a_huge_buffer_gets_a_part(private: bool) -> None:
    async with running(Rng(), private=private) as driver:
        used = await driver.request([], [4 << 20])
        assert used.written == MAX_BYTES_PER_CHAIN
        assert len(set(used.data[0][:MAX_BYTES_PER_CHAIN])) == 256


async def test_no_room_is_no_error() -> None:
    async with running(Rng()) as driver:
        assert (await driver.request([b"readable"])).written == 0
        assert (await driver.request([], [8])).written == 8


async def test_a_file_is_read_over_and_over(tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(b"abcde")
    async with running(Rng(source=tmp_path / "seed")) as driver:
        assert await driver.request([], [3]) == (3, [b"abc"])
        assert await driver.request([], [20]) == (20, [b"deabcdeabcdeabcdeabc"])


def threads_at_work() -> int:
    """Trio names those that are idle otherwise."""
    return sum(" from " in thread.name for thread in threading.enumerate())


async def test_resets_leave_one_thread_with_a_source_that_hangs() -> None:
    host, terminal = os.openpty()  # a character device that gives nothing until somebody types
    try:
        async with running(Rng(source=Path(os.ttyname(terminal)))) as driver:
            for _ in range(5):
                driver.add(0, [], [4])
                driver.kick(0)
                with trio.fail_after(60):
                    while not threads_at_work():
                        await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert threads_at_work() == 1
                await driver.reset()
                driver.probe()
            os.write(host, b"los\nrandom\n")
            assert (await driver.request([], [6])).data[0] == b"random"
    finally:
        os.close(host)
        os.close(terminal)


async def test_a_device_as_source() -> None:
    async with running(Rng(source=Path("/dev/zero"))) as driver:
        assert await driver.request([], [16]) == (16, [bytes(16)])


async def test_a_source_that_vanishes_is_replaced_by_the_host(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "seed").write_bytes(b"abcde")
    device = Rng(source=tmp_path / "seed")
    (tmp_path / "seed").write_bytes(b"")
    async with running(device) as driver:
        used = await driver.request([], [32])
        assert used.written == 32
        assert used.data[0] not in (bytes(32), b"\xaa" * 32)


async def test_the_rate_limit(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Rng(max_bytes=Size(100), period=2000)) as driver:
        start = trio.current_time()
        for expected in (0, 0, 2, 2, 4, 6):  # 60 bytes each; a driver of Linux wants its buffers full
            assert (await driver.request([], [60])).written == 60
            assert trio.current_time() - start == pytest.approx(expected, abs=0.1)
            await driver.reset()  # which gives no more
            driver.probe()
        assert (await driver.request([], [60])).written == 60
        assert trio.current_time() - start == pytest.approx(6, abs=0.1)
        await trio.sleep(100)
        start = trio.current_time()
        for expected in (0, 0, 2):  # no more after a pause either
            assert (await driver.request([], [60])).written == 60
            assert trio.current_time() - start == pytest.approx(expected, abs=0.1)


async def test_a_reset_while_it_waits(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Rng(max_bytes=Size(8), period=1000)) as driver:
        await driver.request([], [8])
        driver.add(0, [], [8])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        await driver.reset()
        driver.probe()
        assert (await driver.request([], [8])).written == 8


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot open source .*nosuch: No such file"):
        Rng(source=tmp_path / "nosuch")
    with pytest.raises(DeviceError, match="Is a directory"):
        Rng(source=tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(DeviceError, match="is empty"):
        Rng(source=tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DeviceError, match="is neither a file nor a device"):
        Rng(source=tmp_path / "fifo")
    with pytest.raises(ConfigError, match="max_bytes=0 "):
        Rng(max_bytes=Size(0))
    with pytest.raises(ConfigError, match="period=0 ms"):
        Rng(period=0)
