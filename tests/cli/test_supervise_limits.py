"""``serve --supervise``: what a client, or a device that does not yield, can ask of a keeper."""

import errno
import os
import resource
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from support.command import ServeProcess, serve_process
from support.processes import children, wait_until_gone
from support.supervised import (
    DEVICES,
    ask,
    client_of,
    device_process,
    driver_of,
    keeper_fds,
    kill_device,
    said,
)

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest import ALL_DRIVERS, bound_pci
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import REGION_ACCESS, Command, PciRegion
from vfiouser_virtio.serving.keeper.relay import MOST_WAITING, OUR_FILES
from vfiouser_virtio.vfio_user import SharedMemory, connect
from vfiouser_virtio.vfio_user.client import Client, RemoteError
from vfiouser_virtio.vfio_user.wire.connection import request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket


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
            await rests(keeper)  # none of what it has open is about to be closed
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


async def computes_until_the_end(served: ServeProcess) -> None:
    """Its driver cannot be unbound then."""
    async with driver_of(served) as device, trio.open_nursery() as nursery:
        nursery.start_soon(ask, device, "compute")
        await said(served, "mine: has not yielded")
        assert await served.terminate() == 0
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_device_that_does_not_yield(tmp_path: Path) -> None:
    """It is killed, and not waited for."""
    (tmp_path / "mine.py").write_text(DEVICES)
    (tmp_path / "compute").touch()
    options = ["--supervise", "--hang-after", "0", "--device", "mine.py:Mine,id=mine"]
    async with serve_process(*options, folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        with pytest.raises(PeerError, match="the server closed the connection"):
            await computes_until_the_end(served)
        wait_until_gone(keeper)
    assert "mine: its process did not yield, and was killed" in served.log.read_text()


def is_served(path: str) -> bool:
    """Whether a client there is answered, and not let go."""
    with suppress(ConnectionError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(path)
        sock.send(request(0, Command.VERSION, b"\0\0\1\0{}\0"))
        return bool(sock.recv(16))
    return False


async def test_clients_that_come_and_go_while_the_device_is_busy(tmp_path: Path) -> None:
    """More than it can be told of at a time; it is not killed for it, and serves the next one that it is told of."""
    options = ["--supervise", "--hang-after", "0", "--device", "rng"]
    async with serve_process(*options, folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        process = device_process(served)
        assert process is not None
        os.kill(process, signal.SIGSTOP)
        for _ in range(400):
            with socket.socket(socket.AF_UNIX) as sock, trio.fail_after(60):
                sock.setblocking(False)
                while sock.connect_ex(served.sockets[0]) == errno.EAGAIN:
                    await trio.sleep(0.01)
        await rests(keeper)
        os.kill(process, signal.SIGCONT)
        with trio.fail_after(60):  # one that comes before it has taken the others is let go, too
            while not is_served(served.sockets[0]):
                await trio.sleep(0.01)
        async with driver_of(served) as device:
            with trio.fail_after(60):
                assert len(await device.driver_data.read(16)) == 16
        assert children(keeper) == [process]
