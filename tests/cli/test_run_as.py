"""``serve --run-as``: what root has opened is served by another user, who has no other group and no capability."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import pytest
import trio
from support.command import environment, run_command, serve_process
from support.processes import children
from support.supervised import device_process, driver_of, kill_device, said

from vfiouser_virtio.engines import Engine
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.serving.privileges import OtherUser, other_user
from vfiouser_virtio.serving.sandbox import Sandbox
from vfiouser_virtio.vfio_user import SharedMemory, connect

pytestmark = pytest.mark.once
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
UID, GID = 54321, 54322


def status(pid: int) -> dict[str, str]:
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: " ".join(value.split()) for name, value in lines}


@needs_root
@pytest.mark.parametrize(
    ("how", "depth"),
    [((), 0), (("--sandbox",), 0), (("--processes",), 1), (("--supervise",), 2)],
    ids=["alone", "sandbox", "processes", "supervise"],
)
async def test_it_serves_as_that_user(how: tuple[str, ...], depth: int, tmp_path: Path) -> None:
    """The image is only root's to open."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"an image".ljust(1 << 20, b"\0"))
    image.chmod(0o600)
    with tempfile.TemporaryDirectory(prefix="of-a-user-") as folder:  # pytest's own are within one of root's alone
        os.chown(folder, UID, GID)
        await serve_there(how, depth, tmp_path, f"{folder}/blk.sock")
        assert os.listdir(folder) == []
    assert image.read_bytes()[8 * 512 :][:512] == b"x" * 512


async def serve_there(how: tuple[str, ...], depth: int, tmp_path: Path, path: str) -> None:
    words = [*how, f"--socket={path}", "--log-level=warning", f"--run-as={UID}:{GID}", "--device", "blk,path=disk.img"]
    async with serve_process(*words, folder=tmp_path) as served:
        pid = served.process.pid
        for _ in range(depth):
            assert status(pid)["Uid"].split()[0] == "0"
            [pid] = children(pid)
        found = status(pid)
        assert (found["Uid"], found["Gid"]) == (" ".join([str(UID)] * 4), " ".join([str(GID)] * 4))
        assert found["Groups"] == ""
        assert {found[name] for name in ("CapEff", "CapPrm", "CapAmb", "CapInh")} == {"0" * 16}
        where = os.stat(served.sockets[0])
        assert (where.st_uid, where.st_gid) == (UID, GID)
        with trio.fail_after(120), SharedMemory(16 << 20) as memory:
            async with connect(served.sockets[0], memory=[memory]) as client, bound_pci(client) as device:
                await device.driver_data.write(8, b"x" * 512)
                assert (await device.driver_data.read(0, 512)).startswith(b"an image")
        assert (await served.terminate(), served.log.read_text()) == (0, "")


@needs_root
async def test_one_that_is_started_again(tmp_path: Path) -> None:
    """It opens the image as root, as the first did, and becomes the user."""
    (tmp_path / "disk.img").write_bytes(b"an image".ljust(1 << 20, b"\0"))
    (tmp_path / "disk.img").chmod(0o600)
    words = ["--supervise", f"--run-as={UID}:{GID}", "--device", "blk,path=disk.img"]
    async with serve_process(*words, folder=tmp_path) as served:
        async with driver_of(served) as device:
            await kill_device(served)
            await said(served, "blk0: resumed")
            with trio.fail_after(60):
                assert (await device.driver_data.read(0, 512)).startswith(b"an image")
            pid = device_process(served)
            assert pid is not None
            assert status(pid)["Uid"] == " ".join([str(UID)] * 4)
        assert await served.terminate() == 0


@pytest.mark.parametrize(
    "text", ["no-such-user", "", "0", "root", "54321", "54321:no-such-group", "4294967295:1", "-1"]
)
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--run-as "):
        other_user(text)


def test_users_and_groups() -> None:
    assert other_user("54321:54322") == OtherUser("54321:54322", UID, GID)
    assert other_user("nobody:54322").gid == GID
    assert other_user("nobody").uid == other_user("nobody:0").uid != 0


@needs_root
def test_only_root_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: UID)
    with pytest.raises(ConfigError, match="only root can become another user; start the server as that user"):
        OtherUser("x", UID, GID).check()


@needs_root
def test_the_signal_of_a_dead_parent_stays() -> None:
    """The kernel forgets it with the user, and a device that hangs would outlive who has started it."""
    ended = subprocess.run([sys.executable, "-c", _BECOMES], env=environment(), capture_output=True, check=True)
    assert int(ended.stdout) == signal.SIGUSR1


_BECOMES = f"""
import ctypes, os, signal
from vfiouser_virtio.libc import libc
from vfiouser_virtio.parent_death import end_with_parent
from vfiouser_virtio.serving.privileges import OtherUser
end_with_parent(os.getppid(), signal.SIGUSR1)
OtherUser("x", {UID}, {GID}).become()
number = ctypes.c_int()
libc.prctl(2, ctypes.byref(number))
print(number.value)
"""


@needs_root
def test_what_has_another_name_is_not_given_away(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of root")
    os.link(tmp_path / "secret", tmp_path / "second.sock")
    (tmp_path / "link.sock").symlink_to("secret")
    for name in ("second.sock", "link.sock"):
        with contextlib.suppress(ConfigError):  # the link itself may be theirs
            OtherUser("x", UID, GID).own([tmp_path / name])
        assert (tmp_path / "secret").stat().st_uid == 0


def test_not_with_the_library() -> None:
    other_engine = cast("Engine", object())
    with pytest.raises(ConfigError, match=r"^--run-as: not with libvfio-user"):
        Sandbox(None, user=OtherUser("x", UID, GID)).check(other_engine)


def test_one_line(tmp_path: Path) -> None:
    ended = run_command("serve", "--run-as=no-such-user", "--device", "rng", cwd=tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("\n") == 1
    assert "--run-as no-such-user: there is no user" in ended.stderr
