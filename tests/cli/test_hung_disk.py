"""A disk of the host that hangs: it holds up its own device, no other one, and not the end of anything.

The file system is a real one (FUSE, direct I/O), and so are io_uring and the threads that get stuck in it.
"""

import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.command import COMMAND, PATIENCE, Process, ServeProcess, environment, serve_process
from support.fuse_files import FuseFiles, Op

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest import BlkDriver, DeviceGone, Disk, bound_pci
from vfiouser_virtio.vfio_user import connect

SECTORS = 2048
GAVE_UP = "SIGTERM: ended without waiting for a request that the host does not end"


async def read_for_ever(path: str, files: FuseFiles) -> None:
    """A client of the disk, until the server is gone; its second read does not end."""
    try:
        with SharedMemory(1 << 20) as memory:
            async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
                disk: Disk = device.driver_data
                assert (await disk.read(0, 1))[:4] == b"disk"
                files.hanging.add(Op.READ)
                await disk.read(8, 8)
                raise AssertionError("the read has ended")
    except* (PeerError, DeviceGone):
        pass


@asynccontextmanager
async def hung_read(path: str, files: FuseFiles) -> AsyncIterator[None]:
    """Within the block a client of the disk has a read under way that the file system has got, and does not answer."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_for_ever, path, files)
        await files.wait_hanging(Op.READ)
        yield
        nursery.cancel_scope.cancel()


async def use(path: str) -> None:
    """A neighbour's registers and requests."""
    with SharedMemory(1 << 20) as memory:
        async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
            disk: Disk = device.driver_data
            assert (await disk.read(1, 1))[:4] == b"near"


@asynccontextmanager
async def two_disks(tmp_path: Path, files: FuseFiles, aio: str, *options: str) -> AsyncIterator[ServeProcess]:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "near").write_bytes(b"near".ljust(512, b".") * SECTORS)
    hung = f"--device=blk,path={files.folder}/disk,aio={aio},id=hung"
    async with serve_process(hung, "--device=blk,path=near", *options, folder=folder) as served:
        yield served


def contents() -> dict[str, bytes]:
    return {"disk": b"disk".ljust(512, b".") * SECTORS}


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
@pytest.mark.parametrize("options", [(), ("--processes",)], ids=["serve", "processes"])
async def test_neighbours_and_the_end_do_not_wait(tmp_path: Path, aio: str, options: tuple[str, ...]) -> None:
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        async with two_disks(tmp_path, files, aio, *options) as served:
            async with hung_read(served.sockets[0], files):
                await use(served.sockets[1])
                assert await served.terminate() == (1 if options else 128 + signal.SIGTERM)
            assert served.log.read_text().count(GAVE_UP) == 1
            assert not [path for path in served.sockets if os.path.exists(path)]


async def test_a_process_that_cannot_even_be_killed_is_left_behind(tmp_path: Path) -> None:
    """The kernel waits for a request that the file system's server has got, whatever signals come."""
    with FuseFiles(tmp_path / "fuse", contents(), interruptible=False) as files:
        async with two_disks(tmp_path, files, "io_uring", "--processes") as served:
            async with hung_read(served.sockets[0], files):
                assert await served.terminate() == 1
            text = served.log.read_text()
            assert text.count(GAVE_UP) == 1
            assert "hung: its process cannot be ended" in text
            assert not [path for path in served.sockets if os.path.exists(path)]


async def test_run_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with FuseFiles(tmp_path / "fuse", contents()) as files, log.open("wb") as stderr:
        read = "dd if=/dev/vda bs=4096 skip=1 count=1 iflag=direct"
        process = Process(
            [
                *COMMAND,
                "run",
                f"--device=blk,path={files.folder}/disk,aio=threads",
                "--exec",
                f"echo booted; sleep 1; {read}",
            ],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert process.stdout is not None
        async with process.stdout:
            with trio.fail_after(PATIENCE):
                printed = b""
                while not printed.endswith(b"\n"):  # a guest's output comes in any pieces
                    piece = await process.stdout.receive_some()
                    assert piece, printed
                    printed += piece
                assert printed == b"booted\n"
                files.hanging.add(Op.READ)
                await files.wait_hanging(Op.READ)
                process.terminate()
                assert await process.wait() == 128 + signal.SIGTERM
    assert GAVE_UP in log.read_text()
