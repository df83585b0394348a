"""``serve --supervise``: the processes of devices die, and their drivers and clients go on."""

import os
import random
import signal
from pathlib import Path

import pytest
import trio
from support import adder
from support.amounts import Amounts
from support.command import run_command, serve_process
from support.processes import children, is_gone, wait_until_gone
from support.supervised import (
    MineDriver,
    ask,
    client_of,
    device_process,
    driver_of,
    keeper_fds,
    kill_device,
    mine_served,
    said,
)

from vfiouser_virtio.guest import DeviceBroken, bound_pci
from vfiouser_virtio.serving.keeper.restarts import DEATHS_TO_GIVE_UP, DEATHS_TO_RESET
from vfiouser_virtio.transports.pci import VIRTIO_BAR
from vfiouser_virtio.vfio_user import connect


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


async def test_a_disk_goes_on_where_its_process_was_killed(tmp_path: Path, disk: Path) -> None:
    async with serve_process("--supervise", "--device", f"blk,path={disk}", folder=tmp_path) as served:
        async with driver_of(served) as device:
            for number in range(3):
                with trio.fail_after(60):
                    await device.driver_data.write(number, bytes([number]) * 512)
                    await kill_device(served)
                    assert await device.driver_data.read(number, 1) == bytes([number]) * 512
                    await device.driver_data.flush()
            await said(served, "blk0: resumed", 3)
        assert await served.terminate() == 0
    assert served.log.read_text().count("was ended by SIGKILL") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


async def test_a_trace_has_its_limit_over_deaths(tmp_path: Path) -> None:
    """Bringing a device up takes more than the limit, and taking it down is traced by another process, or not."""
    arguments = ["--supervise", "--device", "rng", "--trace=t.txt", "--trace-limit=1K"]
    async with serve_process(*arguments, folder=tmp_path) as served:
        async with driver_of(served) as device:
            with trio.fail_after(60):
                await kill_device(served)
                await said(served, "rng0: resumed")
                assert len(await device.driver_data.read(16)) == 16
        assert await served.terminate() == 0
    lines = (tmp_path / "t.txt").read_text().splitlines()
    last = "the trace ends here: it has 1024 bytes (see --trace-limit)"
    assert lines.index(last) == len(lines) - 1


async def test_deaths_leave_no_file_descriptors_in_the_keeper(tmp_path: Path, amounts: Amounts) -> None:
    """But for one: the empty file of `eventfds`, opened with the first notification that finds nothing under way."""
    assert amounts.device_deaths > 1
    async with serve_process("--supervise", "--device", "rng", folder=tmp_path) as served, driver_of(served) as device:
        first = 0
        for number in range(amounts.device_deaths):
            with trio.fail_after(60):
                assert len(await device.driver_data.read(16)) == 16
                first = first or keeper_fds(served)
                await kill_device(served)
                await said(served, "rng0: resumed", number + 1)
        with trio.fail_after(60):
            assert len(await device.driver_data.read(16)) == 16
            while keeper_fds(served) > first + 1:
                await trio.sleep(0.01)


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_a_disk_under_load_dies_again_and_again(ring: str, tmp_path: Path, disk: Path, amounts: Amounts) -> None:
    """Each task has a sector of its own, and reads what it has written; what was flushed is in the file."""
    rng = random.Random(ring)
    device_option = f"blk,path={disk},packed={'on' if ring == 'packed' else 'off'}"
    async with serve_process("--supervise", "--device", device_option, folder=tmp_path) as served:
        async with driver_of(served) as device, trio.open_nursery() as nursery:
            rounds = [0] * 16

            async def use(sector: int) -> None:
                while True:
                    data = bytes([sector, rounds[sector] & 0xFF]) * 256
                    await device.driver_data.write(sector, data)
                    if sector % 4 == 0:
                        await device.driver_data.flush()
                        assert disk.read_bytes()[512 * sector :][:512] == data
                    assert await device.driver_data.read(sector, 1) == data
                    rounds[sector] += 1

            for sector in range(16):
                nursery.start_soon(use, sector)
            for death in range(amounts.device_deaths):
                before = list(rounds)
                with trio.fail_after(60):
                    while any(now == then for now, then in zip(rounds, before, strict=True)):
                        await trio.sleep(rng.random() / 50)
                    await kill_device(served)
                    await said(served, "requests that were under way are done again", death + 1)
            nursery.cancel_scope.cancel()
        log = served.log.read_text()
    assert log.count("was ended by SIGKILL") == amounts.device_deaths


async def test_registers_written_without_waiting_are_written_once(tmp_path: Path) -> None:
    """In order, over deaths in the middle of it."""
    total = 0
    async with (
        serve_process("--supervise", "--device", f"{adder.__file__}:Adder", folder=tmp_path) as served,
        client_of(served) as client,
    ):
        for at, size, value in (0x14, 1, 1), (0x14, 1, 3), (0x08, 4, 1), (0x0C, 4, 1), (0x14, 1, 0xB):
            client.bar_post(VIRTIO_BAR, at, size, value)
        for death in range(DEATHS_TO_RESET):
            for number in range(100):
                value = 100 * death + number
                client.bar_post(VIRTIO_BAR, adder.ADD, 4, value)
                total = adder.added(total, value)
            with trio.fail_after(60):
                await client.bar_read(VIRTIO_BAR, adder.ADD, 4)
                for number in range(100):
                    client.bar_post(VIRTIO_BAR, adder.ADD, 4, number)
                    total = adder.added(total, number)
                await kill_device(served)
                assert await client.bar_read(VIRTIO_BAR, adder.TOTAL, 8) == total
    assert served.log.read_text().count("was ended by SIGKILL") == DEATHS_TO_RESET


async def test_one_that_hangs_is_killed_and_its_request_is_done_again(tmp_path: Path) -> None:
    async with mine_served(tmp_path, "Resumable", "--hang-after", "1") as served, driver_of(served) as device:
        assert await ask(device, "work") == b"done"
        (tmp_path / "hang").touch()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                assert await ask(device, "hang") == b"done"

            await said(served, "its process hangs")
            (tmp_path / "hang").unlink()
        await said(served, "1 requests that were under way are done again")


async def test_one_that_hangs_as_it_begins_is_killed(tmp_path: Path) -> None:
    """Whatever it opens may hang, and its client waits."""
    async with mine_served(tmp_path, "Resumable", "--hang-after", "0.5") as served, driver_of(served) as device:
        (tmp_path / "stuck").touch()
        await kill_device(served)
        await said(served, "its process hangs: it has not begun to serve for 5 s, and is killed")
        (tmp_path / "stuck").unlink()
        assert await ask(device, "work") == b"done"


@pytest.mark.parametrize("hang_after", ["12", "0"])
async def test_one_that_grows_is_killed_and_its_request_is_done_again(tmp_path: Path, hang_after: str) -> None:
    """At one of six looks within the time after which it would be taken for hung, and also where it never is."""
    options = ["--max-memory=150M", "--hang-after", hang_after]
    async with mine_served(tmp_path, "Resumable", *options) as served, driver_of(served) as device:
        assert await ask(device, "work") == b"done"
        (tmp_path / "grow").touch()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                assert await ask(device, "grow") == b"done"

            await said(served, "MiB of memory, and is killed: --max-memory is 150.0 MiB")
            (tmp_path / "grow").unlink()
        await said(served, "1 requests that were under way are done again")


async def test_a_device_that_cannot_go_on_needs_a_reset(tmp_path: Path) -> None:
    """Of a kind of the user's that does not say that it can; its driver starts anew, and is served."""
    async with mine_served(tmp_path, "Mine") as served, client_of(served) as client:
        async with bound_pci(client, MineDriver()) as device:
            await kill_device(served)
            with pytest.raises(DeviceBroken, match="needs a reset"):
                await ask(device, "work")
            await said(served, "it is of a kind that cannot go on without its memory")
        async with bound_pci(client, MineDriver()) as device:
            assert await ask(device, "work") == b"done"


async def test_one_that_dies_of_a_request_is_given_up_in_the_end(tmp_path: Path) -> None:
    """First its request is done again, then its driver is told, and at last it has a stand-in: the client never waits
    in vain, and the next one has a device again."""
    (tmp_path / "die").touch()
    async with mine_served(tmp_path, "Resumable") as served:
        async with client_of(served) as client:
            for _ in range(1 + DEATHS_TO_GIVE_UP - DEATHS_TO_RESET):
                async with bound_pci(client, MineDriver()) as device:
                    with pytest.raises(DeviceBroken, match="needs a reset"):
                        await ask(device, "die")
            await said(served, "it is given up")
            with pytest.raises(DeviceBroken):
                async with bound_pci(client, MineDriver()):
                    pass
        (tmp_path / "die").unlink()
        async with driver_of(served) as device:
            assert await ask(device, "die") == b"done"
    assert served.log.read_text().count("was ended by SIGSEGV") == DEATHS_TO_GIVE_UP


async def test_an_exit_is_a_death(tmp_path: Path) -> None:
    async with mine_served(tmp_path, "Mine") as served, driver_of(served) as device:
        with pytest.raises(DeviceBroken, match="needs a reset"):
            await ask(device, "exit")
        await said(served, "its process ended without a reason; another one is started")


async def test_a_signal_to_a_devices_process_is_a_death(tmp_path: Path, disk: Path) -> None:
    """One that ended in order would leave its driver without an answer."""
    async with serve_process("--supervise", "--device", f"blk,path={disk}", folder=tmp_path) as served:
        async with driver_of(served) as device:
            for number in range(5):
                process = device_process(served)
                assert process is not None
                for ignored in signal.SIGINT, signal.SIGHUP:
                    os.kill(process, ignored)
                with trio.fail_after(60):
                    await device.driver_data.write(number, bytes([number]) * 512)
                    os.kill(process, signal.SIGTERM)
                    assert await device.driver_data.read(number, 1) == bytes([number]) * 512
                await said(served, "blk0: resumed", number + 1)
        assert await served.terminate() == 0
    assert served.log.read_text().count("was ended by SIGTERM") == 5


async def test_a_device_that_computes_for_ever_is_killed(tmp_path: Path) -> None:
    """By its keeper, while it works; and when the keeper is told to end."""
    async with (
        mine_served(tmp_path, "Resumable", "--hang-after", "1") as served,
        driver_of(served) as device,
        trio.open_nursery() as nursery,
    ):
        (tmp_path / "compute").touch()
        nursery.start_soon(ask, device, "compute")
        await said(served, "its process hangs")
        (tmp_path / "compute").unlink()
        await said(served, "1 requests that were under way are done again")


async def test_a_device_that_cannot_be_made_again_is_given_up(tmp_path: Path, disk: Path) -> None:
    """Its keeper lives, and when the cause is gone the next client has the device."""
    async with serve_process("--supervise", "--device", f"blk,path={disk}", folder=tmp_path) as served:
        async with driver_of(served):
            disk.rename(tmp_path / "away")
            await kill_device(served)
            await said(served, "it is given up")
            assert "cannot be started again" in served.log.read_text()
        (tmp_path / "away").rename(disk)
        async with driver_of(served) as device:
            with trio.fail_after(60):
                assert await device.driver_data.read(0, 1) == bytes(512)
        assert await served.terminate() == 0


async def test_the_only_client_leaves_while_there_is_no_process(tmp_path: Path) -> None:
    async with serve_process("--supervise", "--once", "--device", "rng", folder=tmp_path) as served:
        async with driver_of(served):
            [keeper] = children(served.process.pid)
            pid = device_process(served)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while children(keeper) == [pid]:
                await trio.lowlevel.checkpoint()
        assert await served.wait() == 0


async def test_none_outlives_the_others(tmp_path: Path) -> None:
    async with serve_process("--supervise", "--device", "rng", "--device", "rng", folder=tmp_path) as served:
        keepers = children(served.process.pid)
        pids = [*keepers, *(pid for keeper in keepers for pid in children(keeper))]
        assert len(pids) == 4
        served.process.kill()
        wait_until_gone(*pids)


async def test_a_keeper_that_is_killed_takes_only_its_own_device_along(tmp_path: Path) -> None:
    async with serve_process("--supervise", "--device", "rng", "--device", "rng", folder=tmp_path) as served:
        first, _second = children(served.process.pid)
        [process] = children(first)
        os.kill(first, signal.SIGKILL)
        await said(served, "rng0: its process was ended by SIGKILL; the device is gone")
        with trio.fail_after(60):
            while not is_gone(process):
                await trio.sleep(0.01)
            async with connect(served.sockets[1]) as client:
                await client.device_info()


async def test_one_client_alone_is_served_until_it_leaves(tmp_path: Path) -> None:
    async with serve_process("--supervise", "--once", "--device", "rng", folder=tmp_path) as served:
        async with driver_of(served) as device:
            await kill_device(served)
            with trio.fail_after(60):
                assert len(await device.driver_data.read(100)) == 100
        assert await served.wait() == 0


async def test_a_device_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    ended = run_command("serve", "--supervise", "--device", "blk,path=none", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--supervise", "--engine", "libvfio-user"], "--supervise: not with --engine libvfio-user"),
        (["--supervise", "--audit"], "--audit: not with --supervise"),
        (["--hang-after", "1"], "--hang-after is for --supervise"),
        (["--max-memory", "1G"], "--max-memory is for --supervise"),
        (["--supervise", "--max-memory", "much"], "argument --max-memory: "),
        (["--supervise", "--hang-after", "-1"], "no number of seconds"),
        (["--supervise", "--device", "rng,fault=needs-reset"], "fault=NAME: not with --supervise"),
    ],
)
def test_what_cannot_be_supervised(options: list[str], what: str, tmp_path: Path) -> None:
    ended = run_command("serve", "--device", "rng", *options, cwd=tmp_path)
    assert ended.returncode == 2
    assert what in ended.stderr.splitlines()[-1]
