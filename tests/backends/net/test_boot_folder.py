"""Files of the boot server's folder: never one outside of it, nothing that is no file, no descriptor left open."""

import errno
import os
import socket
from pathlib import Path

import pytest

from vfiouser_virtio.backends.net.boot.folder import Folder
from vfiouser_virtio.errors import DeviceError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """With files inside and one outside, and links to them."""
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "tftp"
    (inside / "below").mkdir(parents=True)
    (inside / "below" / "file").write_text("content")
    (inside / "link").symlink_to("below/../below/file")
    (inside / "absolute").symlink_to(inside / "below" / "file")
    (inside / "out").symlink_to("../secret")
    (inside / "folder").symlink_to("..")
    (inside / "circle").symlink_to("circle")
    (inside / "process").symlink_to("/proc/self/environ")
    os.mkfifo(inside / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(inside / "socket"))
    return Folder(inside)


@pytest.mark.parametrize(
    "name", ["below/file", "/below/file", "//below//file", "link", "below/../link", "./below/./file"]
)
def test_what_lies_inside_is_opened(folder: Folder, name: str) -> None:
    file = folder.open(name.encode())
    assert file.size == 7
    assert file.read(0, 100) == b"content"
    assert file.read(3, 2) == b"te"
    assert file.read(7, 1) == b""


@pytest.mark.parametrize(
    "name",
    ["../secret", "/../secret", "below/../../secret", "out", "absolute", "folder/secret", "folder/tftp/below/file",
     "process", "circle", "fifo", "socket", "below", "/", ".", "..", "below/.."],
)  # fmt: skip
def test_what_lies_outside_or_is_no_file_is_refused(folder: Folder, name: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PermissionError):
        folder.open(name.encode())
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("name", ["missing", "below/missing", "below/file/x", "x" * 300, "\xff"])
def test_what_is_not_there_is_not_found(folder: Folder, name: str) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        folder.open(name.encode("latin-1"))
    assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def test_everything_is_closed_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    before = os.listdir("/proc/self/fd")
    folder = Folder(tmp_path)
    files = [folder.open(b"file") for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == len(before) + 4
    del files, folder
    assert os.listdir("/proc/self/fd") == before


def test_the_folder_is_the_one_that_was_there_at_first(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    folder = Folder(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "two").rename(tmp_path / "one")
    assert folder.open(b"file").read(0, 10) == b"one"


def test_a_folder_that_is_none_is_the_user_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(DeviceError, match=rf"tftp={tmp_path / name}: {why}"):
            Folder(tmp_path / name)
