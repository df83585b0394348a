"""``serve --supervise``: the processes of devices die, and their drivers and clients go on."""

import os
import random
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from support.amounts import Amounts
from support.command import ServeProcess, run_command, serve_process
from support.processes import children

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest import ALL_DRIVERS, DeviceBroken, VirtioDevice, VirtioDriver, bound_pci, virtio_ids
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import REGION_ACCESS, Command, PciRegion
from vfiouser_virtio.serving.keeper.relay import MOST_WAITING, OUR_FILES
from vfiouser_virtio.serving.keeper.restarts import DEATHS_TO_GIVE_UP, DEATHS_TO_RESET
from vfiouser_virtio.vfio_user import SharedMemory, connect
from vfiouser_virtio.vfio_user.client import Client, RemoteError
from vfiouser_virtio.vfio_user.wire.connection import request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

# Each does something when there is a file called as it says, and answers requests otherwise.
DEVICES = """\
import ctypes, os, time
from vfiouser_virtio.virtio import Device, queue

class Mine(Device):
    device_id = 42
    requestq = queue()

    async def run(self):
        async for chain in self.requestq:
            word = chain.readable.read().rstrip(b"\\0").decode()
            if word == "hang" and os.path.exists("hang"):
                time.sleep(1000)
            if word == "die" and os.path.exists("die"):
                ctypes.string_at(0)
            if word == "exit":
                os._exit(0)
            chain.writable.write(b"done")
            chain.complete()

class Resumable(Mine):
    def can_resume(self):
        return True
"""


def is_gone(pid: int) -> bool:
    """Nothing of it runs any more, though in a container nobody may ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def device_process(served: ServeProcess) -> int | None:
    """That of the only device, if there is one at the moment."""
    [keeper] = children(served.process.pid)
    return next(iter(children(keeper)), None)


def keeper_fds(served: ServeProcess) -> int:
    """How many file descriptors the only keeper has open."""
    [keeper] = children(served.process.pid)
    return len(os.listdir(f"/proc/{keeper}/fd"))


async def kill_device(served: ServeProcess) -> None:
    """Kill it, as soon as there is one."""
    while (pid := device_process(served)) is None:
        await trio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


async def said(served: ServeProcess, words: str, times: int = 1) -> None:
    """Wait until the log has said this."""
    with trio.fail_after(60):
        while served.log.read_text().count(words) < times:
            await trio.sleep(0.01)


@asynccontextmanager
async def client_of(served: ServeProcess) -> AsyncIterator[Client]:
    """A connection that outlives the device."""
    with SharedMemory(16 << 20) as memory:
        async with connect(served.sockets[0], memory=[memory]) as client:
            yield client


@asynccontextmanager
async def driver_of(served: ServeProcess) -> AsyncIterator[VirtioDevice]:
    """A driver in this process, on such a connection."""
    async with (
        client_of(served) as client,
        bound_pci(client, MineDriver(), *(make() for make in ALL_DRIVERS)) as device,
    ):
        yield device


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


async def map_files(client: Client, count: int) -> None:
    """So many DMA regions, each of a file of its own."""
    for number in range(count):
        with SharedMemory(4096) as memory:
            await client.dma_map((1 << 36) + 4096 * number, 4096, fd=memory.fd)


def processor_ticks(pid: int) -> int:
    """Ticks of the processor that it has used, a hundred a second."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


async def rests(pid: int) -> None:
    """Wait until it does nothing: it does not look at the same thing again and again."""
    with trio.fail_after(60):
        used = 50
        while used >= 10:
            before = processor_ticks(pid)
            await trio.sleep(0.5)
            used = processor_ticks(pid) - before


async def test_a_client_cannot_fill_the_keepers_table_of_files(tmp_path: Path) -> None:
    """There is room for another process of the device, and for another client, to be refused."""
    async with serve_process("--supervise", "--device", "rng", folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (100, 100))
        async with client_of(served) as client, bound_pci(client, *(make() for make in ALL_DRIVERS)) as device:
            with pytest.raises(RemoteError, match="Too many open files"):
                await map_files(client, 100)
            assert keeper_fds(served) <= 100 - OUR_FILES
            with trio.fail_after(60):
                for death in range(3):
                    assert len(await device.driver_data.read(16)) == 16
                    await kill_device(served)
                    await said(served, "rng0: resumed", death + 1)
                assert len(await device.driver_data.read(16)) == 16
            with pytest.raises(PeerError, match="closed the connection"), trio.fail_after(60):
                async with connect(served.sockets[0]):
                    pass
            await said(served, "refused another client")
    assert "no process for it" not in served.log.read_text()


async def test_a_keeper_without_room_for_a_file_waits(tmp_path: Path) -> None:
    """Without a process until its client leaves, and without asking again and again for the next client."""
    async with serve_process("--supervise", "--device", "rng", folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        async with client_of(served) as client:
            await map_files(client, 16)
            full = max(int(name) for name in os.listdir(f"/proc/{keeper}/fd")) + 1
            assert full == keeper_fds(served)
            resource.prlimit(keeper, resource.RLIMIT_NOFILE, (full, 200))
            with socket.socket(socket.AF_UNIX) as another:
                another.connect(served.sockets[0])
                await rests(keeper)
            await kill_device(served)
            await said(served, "rng0: no process for it: Too many open files")
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (200, 200))
        async with driver_of(served) as device:
            with trio.fail_after(60):
                assert len(await device.driver_data.read(16)) == 16
        assert children(served.process.pid) == [keeper]


async def test_a_client_that_goes_behind_more_requests_than_are_taken(tmp_path: Path) -> None:
    """While the device's process serves none of them."""
    options = ["--supervise", "--hang-after", "0", "--device", "rng"]
    async with serve_process(*options, folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        process = device_process(served)
        assert process is not None
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(served.sockets[0])
            os.kill(process, signal.SIGSTOP)
            # What waits takes more than 256 bytes each in the keeper; then no more is taken.
            requests = memoryview(request(0, Command.DEVICE_GET_INFO) * (MOST_WAITING // 128))
            sock.setblocking(False)
            sent, writable = 0, True
            while writable:
                with suppress(BlockingIOError):
                    sent += sock.send(requests[sent:])
                with trio.move_on_after(1) as waiting:
                    await trio.lowlevel.wait_writable(sock)
                writable = not waiting.cancelled_caught
            assert sent < len(requests)
        await rests(keeper)
        os.kill(process, signal.SIGCONT)
        async with driver_of(served) as device:
            with trio.fail_after(60):
                assert len(await device.driver_data.read(16)) == 16


async def test_a_client_that_reads_its_answers_late_gets_each_of_them_once(tmp_path: Path) -> None:
    """More than the keeper keeps, and the process dies meanwhile."""
    count, size = 6000, 4096
    async with serve_process("--supervise", "--device", "rng", folder=tmp_path) as served:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(served.sockets[0])
            sock.send(request(0, Command.VERSION, b"\0\0\1\0{}\0"))
            access = codec(REGION_ACCESS).pack(0, PciRegion.CONFIG, size)
            for number in range(count):
                sock.sendall(request(number & 0xFFFF, Command.REGION_READ, access))
            await kill_device(served)
            await said(served, "another one is started")
            answers = MessageSocket(sock.dup())
            sock.setblocking(False)
            expected = -1
            with trio.fail_after(60):
                while expected < count:
                    await trio.lowlevel.wait_readable(answers.socket)
                    assert answers.receive_nowait()
                    while answers.connection.next():
                        message = answers.connection.message()
                        assert message.id == max(expected, 0)
                        assert expected < 0 or len(message.body) == len(access) + size
                        expected += 1
            answers.close()
        assert await served.terminate() == 0


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


class MineDriver(VirtioDriver):
    """Driver that makes a queue of requests of each such device."""

    name = "mine"
    id_table = virtio_ids(42)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(0)
        device.driver_data = await RequestQueue.open(device, 0)

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.close()


async def ask(device: VirtioDevice, word: str) -> bytes:
    with trio.fail_after(60):
        written, [answer] = await device.driver_data.request([word.encode()], [16])
    return bytes(answer[:written])


@asynccontextmanager
async def mine_served(folder: Path, kind: str) -> AsyncIterator[ServeProcess]:
    (folder / "mine.py").write_text(DEVICES)
    options = ["--supervise", "--hang-after", "1", "--device", f"mine.py:{kind},id=mine"]
    async with serve_process(*options, folder=folder) as served:
        yield served
        assert await served.terminate() == 0


async def test_one_that_hangs_is_killed_and_its_request_is_done_again(tmp_path: Path) -> None:
    async with mine_served(tmp_path, "Resumable") as served, driver_of(served) as device:
        assert await ask(device, "work") == b"done"
        (tmp_path / "hang").touch()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                assert await ask(device, "hang") == b"done"

            await said(served, "its process hangs")
            (tmp_path / "hang").unlink()
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


async def test_an_end_by_a_signal_is_a_death(tmp_path: Path) -> None:
    """The client stays connected, and its next driver has a device."""
    async with serve_process("--supervise", "--device", "rng", folder=tmp_path) as served, client_of(served) as client:
        pid = device_process(served)
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        await said(served, "another one is started")
        with trio.fail_after(60):
            async with bound_pci(client, *(make() for make in ALL_DRIVERS)) as device:
                assert len(await device.driver_data.read(16)) == 16


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
        with trio.fail_after(60):
            while any(not is_gone(pid) for pid in pids):
                await trio.sleep(0.01)


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
        (["--supervise", "--hang-after", "-1"], "no number of seconds"),
        (["--supervise", "--device", "rng,fault=needs-reset"], "fault=NAME: not with --supervise"),
    ],
)
def test_what_cannot_be_supervised(options: list[str], what: str, tmp_path: Path) -> None:
    ended = run_command("serve", "--device", "rng", *options, cwd=tmp_path)
    assert ended.returncode == 2
    assert what in ended.stderr.splitlines()[-1]
