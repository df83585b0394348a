"""A disk of the host that hangs: it holds up its own device, no other one, and not the end of anything.

The file system is a real one (FUSE, direct I/O), and so are io_uring and the threads that get stuck in it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from support import fake_qemu
from support.command import COMMAND, PATIENCE, Process, ServeProcess, environment, serve_process
from support.fuse_files import FuseFiles, Op
from support.waiting import never_waits

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.errors import DeviceError, PeerError
from vfiouser_virtio.guest import BlkDriver, ConsoleDriver, DeviceGone, Disk, RequestFailed, bound_pci
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.vfio_user import connect

SECTORS = 2048
GAVE_UP_BY_ITSELF = "ended without waiting for a request that the host does not end"
GAVE_UP = f"SIGTERM: {GAVE_UP_BY_ITSELF}"


async def read_for_ever(path: str, files: FuseFiles) -> None:
    """A client of the disk, until the server is gone; its second read does not end, or fails together with that."""
    try:
        with SharedMemory(1 << 20) as memory:
            async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
                disk: Disk = device.driver_data
                assert (await disk.read(0, 1))[:4] == b"disk"
                files.hanging.add(Op.READ)
                await disk.read(8, 8)
                raise AssertionError("the read has ended")
    except* (PeerError, DeviceGone, RequestFailed):
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
@pytest.mark.diagonal("aio", "options")
async def test_neighbours_and_the_end_do_not_wait(tmp_path: Path, aio: str, options: tuple[str, ...]) -> None:
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        async with two_disks(tmp_path, files, aio, *options) as served:
            async with hung_read(served.sockets[0], files):
                await use(served.sockets[1])
                status = await served.terminate()
                assert status == (1 if options else 128 + signal.SIGTERM), served.log.read_text()
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


@pytest.mark.qemu
async def test_run_exec_ends_with_the_status_of_its_command(tmp_path: Path) -> None:
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        files.hanging.add(Op.WRITE)
        write = "dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct 2>/dev/null"
        script = f"{write} & until grep -q '[1-9]' /sys/block/vda/inflight; do sleep 0.1; done; exit 7"
        disk = f"--device=blk,path={files.folder}/disk,aio=threads"
        async with started("run", "--accel", "tcg", disk, "--exec", script, folder=tmp_path) as process:
            await files.wait_hanging(Op.WRITE)
            assert await process.wait() == 7
    said = (tmp_path / "log").read_text().splitlines()
    # A busy machine takes long to open a file, too.
    assert [line for line in said if "takes long" not in line] == [f"vfiouser-virtio: {GAVE_UP_BY_ITSELF}"]


@pytest.mark.parametrize("options", [(), ("--processes",)], ids=["run", "processes"])
@pytest.mark.parametrize("ends", ["signal", "guest"])
@pytest.mark.diagonal("ends", "options")
async def test_run_ends(tmp_path: Path, ends: str, options: tuple[str, ...]) -> None:
    """By a signal, or with its guest."""
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!{sys.executable}\n{Path(fake_qemu.__file__).read_text()}")
    qemu.chmod(0o755)
    env = {"VFIOUSER_VIRTIO_QEMU": str(qemu), "FAKE_QEMU_PID": str(tmp_path / "pid")}
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        devices = ["--device=rng", f"--device=blk,path={files.folder}/disk,aio=threads,socket=s"]
        guest = ["--", "-kernel", "none"]
        async with started("run", *devices, *options, *guest, folder=tmp_path, env=env) as process:
            while not (tmp_path / "pid").exists():
                await trio.sleep(0.02)
            async with hung_read(str(tmp_path / "s"), files):
                if ends == "signal":
                    process.terminate()
                    assert await process.wait() == (1 if options else 128 + signal.SIGTERM)
                else:
                    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
                    assert await process.wait() == 5
        said = (tmp_path / "log").read_text()
        assert said.count(GAVE_UP if ends == "signal" or options else GAVE_UP_BY_ITSELF) == 1
        assert ("the guest did not end well" in said) == (ends == "guest")
        assert not (tmp_path / "s").exists()


@asynccontextmanager
async def started(
    *arguments: str, folder: Path, env: Mapping[str, str] | None = None, **streams: int
) -> AsyncIterator[Process]:
    """The command, with its stderr in the folder's ``log``; killed in the end if nobody has ended it."""
    with (folder / "log").open("wb") as stderr:
        process = Process(
            [*COMMAND, *arguments],
            cwd=folder,
            env=environment(XDG_RUNTIME_DIR=str(folder), **(env or {})),
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr, **streams},
        )
    try:
        with trio.fail_after(PATIENCE):
            yield process
    finally:
        process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()


async def wait_said(folder: Path, words: str) -> None:
    while words not in (folder / "log").read_text():
        await trio.sleep(0.02)


@pytest.mark.parametrize("op", [Op.OPEN, Op.STATFS, Op.READ], ids=lambda op: op.name)
@pytest.mark.parametrize("options", [(), ("--processes",)], ids=["serve", "processes"])
@pytest.mark.diagonal("op", "options")
async def test_a_disk_that_hangs_at_the_start(tmp_path: Path, op: Op, options: tuple[str, ...]) -> None:
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        files.hanging.add(op)
        hung = f"--device=blk,path={files.folder}/disk,id=hung"
        async with started("serve", hung, "--device=rng", *options, folder=tmp_path) as process:
            await files.wait_hanging(op)
            await wait_said(tmp_path, "hung: to make it takes long: a file system of the host is slow, or hangs")
            process.terminate()
            assert await process.wait() == 0
        assert (tmp_path / "log").read_text().count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fuse", "log"]


async def test_a_disk_that_hangs_is_made_and_closed_beside_the_loop(tmp_path: Path) -> None:
    """Of a program that serves: its other devices go on, and what comes to be too late is closed again."""
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        image = files.folder / "disk"
        files.hanging.add(Op.OPEN)
        with never_waits():
            async with serve("blk,size=1M", path=tmp_path / "near") as near:
                assert near.endpoints[0].socket_path is not None
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(serve_for_ever, f"blk,path={image}")
                        await files.wait_hanging(Op.OPEN)
                        with SharedMemory(1 << 20) as memory:
                            async with connect(near.endpoints[0].socket_path, memory=[memory]) as client:
                                assert len(await client.region_read(PciRegion.CONFIG, 0, 2)) == 2
                        scope.cancel()
                files.release()
                async with AsyncExitStack() as stack:
                    late = trio.current_time() + PATIENCE
                    while not await try_to_serve(f"blk,path={image}", stack):
                        assert trio.current_time() < late
                        await trio.sleep(0.02)
                    files.hanging.add(Op.FLUSH)
            await files.wait_hanging(Op.FLUSH)  # which close(2) waits for
        files.release()


async def serve_for_ever(device: str) -> None:
    async with serve(device) as served:
        await served.wait_finished()


async def try_to_serve(device: str, stack: AsyncExitStack) -> bool:
    """Whether it could be; not while a device that nobody waits for any more comes to be, and is closed."""
    try:
        await stack.enter_async_context(serve(device))
    except DeviceError:
        return False
    return True


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
@pytest.mark.parametrize("options", [(), ("--processes",)], ids=["serve", "processes"])
@pytest.mark.diagonal("aio", "options")
async def test_once_ends_with_its_client(tmp_path: Path, aio: str, options: tuple[str, ...]) -> None:
    with FuseFiles(tmp_path / "fuse", contents()) as files:
        folder = tmp_path / "work"
        folder.mkdir()
        hung = f"--device=blk,path={files.folder}/disk,aio={aio},id=hung"
        async with serve_process(hung, "--once", *options, folder=folder) as served:
            async with hung_read(served.sockets[0], files):
                pass
            assert await served.wait() == 0
            # A request of io_uring's may end when it is cancelled, as this file system takes part.
            assert served.log.read_text().count(GAVE_UP_BY_ITSELF) in ((0, 1) if aio == "io_uring" else (1,))


async def test_a_console_on_standard_streams_that_hang(tmp_path: Path) -> None:
    """A file as standard output, on a file system that hangs: the port is held up, and nothing else."""
    with FuseFiles(tmp_path / "fuse", {**contents(), "out": b"", "in": b"typed"}, direct=False) as files:
        fds = [os.open(files.folder / name, os.O_RDWR | os.O_CLOEXEC) for name in ("in", "out")]
        (tmp_path / "near").write_bytes(b"near".ljust(512, b".") * SECTORS)
        devices = ["--device=console,chardev=stdio,socket=c", "--device=blk,path=near,socket=d"]
        async with started("serve", *devices, folder=tmp_path, stdin=fds[0], stdout=fds[1]) as process:
            while b"ready 2" not in files.content("out"):
                await trio.sleep(0.02)
            files.hanging |= {Op.WRITE, Op.GETATTR, Op.STATFS}
            with SharedMemory(1 << 20) as memory:
                async with (
                    connect(str(tmp_path / "c"), memory=[memory]) as client,
                    bound_pci(client, ConsoleDriver()) as device,
                ):
                    port = await device.driver_data.wait_port(0)
                    assert (await port.receive())[:5] == b"typed"
                    await port.send(b"printed")
                    await files.wait_hanging(Op.WRITE)
                    await use(str(tmp_path / "d"))
            process.terminate()
            assert await process.wait() == 0
        files.release()
        for fd in fds:
            os.close(fd)
