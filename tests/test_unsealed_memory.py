"""A client truncates the file of its memory while its disk works: what becomes of the devices of others."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.command import PATIENCE, ServeProcess, environment, serve_process
from support.libvfio_user_found import find

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.guest import BlkDriver, Disk, bound_pci
from vfiouser_virtio.vfio_user import connect

pytestmark = pytest.mark.once

TRUNCATING_CLIENT = Path(__file__).parent / "support" / "truncating_client.py"
NOBODY = 65534


@pytest.fixture(params=["vfio-user", "libvfio-user"])
def engine(request: pytest.FixtureRequest) -> list[str]:
    """The options for each engine, of which the C library may not be there."""
    if request.param == "vfio-user":
        return []
    library, reason = find()
    if library is None:
        pytest.skip(reason)
    return ["--engine=libvfio-user", f"--libvfio-user={library.path}"]


@asynccontextmanager
async def two_disks(tmp_path: Path, engine: list[str], option: str = "") -> AsyncIterator[ServeProcess]:
    (tmp_path / "image").write_bytes(b"disk".ljust(512, b".") * 1024)
    with tempfile.TemporaryDirectory() as folder:  # of which others can reach a socket
        os.chmod(folder, 0o711)
        devices = [f"--device=blk,path=image,readonly=on,socket={folder}/{name}{option}" for name in "ab"]
        async with serve_process(*devices, *engine, folder=tmp_path) as served:
            os.chmod(served.sockets[0], 0o666)
            yield served


@asynccontextmanager
async def truncated(served: ServeProcess, uid: int | None = None) -> AsyncIterator[None]:
    """From when the first disk's client has truncated its memory until it leaves."""
    client = await trio.lowlevel.open_process(
        [sys.executable, TRUNCATING_CLIENT, served.sockets[0], str(os.getuid() if uid is None else uid)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        with trio.fail_after(PATIENCE):
            said = b""
            while not said.endswith(b"\n"):  # it comes in any pieces
                piece = await client.stdout.receive_some()
                assert piece, said
                said += piece
            assert said == b"truncated\n"
            yield
            await client.stdin.aclose()
            await client.wait()
    finally:
        client.kill()
        await client.stdin.aclose()
        await client.stdout.aclose()
        with trio.CancelScope(shield=True):
            await client.wait()


async def use(path: str) -> None:
    with SharedMemory(1 << 20) as memory:
        async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
            disk: Disk = device.driver_data
            assert (await disk.read(1023, 1))[:8] == b"disk...."


async def said(served: ServeProcess, text: str) -> None:
    with trio.fail_after(PATIENCE):
        while text not in served.log.read_text():
            await trio.sleep(0.02)


async def all_live(served: ServeProcess, uid: int | None = None) -> None:
    async with truncated(served, uid):
        await said(served, "the file has become shorter")  # the disk has been at it
        await use(served.sockets[1])
    await use(served.sockets[0])
    assert await served.terminate() == 0


async def test_what_it_is_about(tmp_path: Path) -> None:
    """Memory of our own user's clients is mapped, and the line that says so is true."""
    async with two_disks(tmp_path, []) as served, truncated(served):
        assert await served.wait() == -signal.SIGBUS
        assert served.log.read_text().count("It is mapped all the same, as the client is of our own user") == 1


async def test_memory_that_is_copied_is_no_danger(tmp_path: Path, engine: list[str]) -> None:
    async with two_disks(tmp_path, engine, ",unsealed-memory=copy") as served:
        await all_live(served)
        assert served.log.read_text().count("So it is not mapped: each access takes a system call") == 1


async def test_clients_of_others_are_no_danger(tmp_path: Path, engine: list[str]) -> None:
    if os.getuid():
        pytest.skip("only root can have a client of another user")
    async with two_disks(tmp_path, engine) as served:
        await all_live(served, NOBODY)
        assert served.log.read_text().count(f"and the client is of another user ({NOBODY}). So it is not mapped") == 1
