"""Files that are written: for their owner only, and never through a link."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiouser_virtio.backends.log_file import LogFile
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.output_file import open_output
from vfiouser_virtio.serving.fault_log import fault_log
from vfiouser_virtio.serving.trace import TraceLog

OPENING: dict[str, Callable[[Path], object]] = {
    "chardev": LogFile,
    "dump": lambda path: RecordedNetdev(NullNetdev(), dump=path),
    "fault-log": fault_log,
    "burndown": lambda path: fault_log(path, "burndown"),
    "trace": lambda path: TraceLog(str(path), as_json=False, limit=1 << 20),
}


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("option", OPENING)
def test_a_link_is_not_followed(option: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another program")
    (tmp_path / "log").symlink_to(tmp_path / "secret")
    with pytest.raises((ConfigError, DeviceError), match="log: is a symbolic link: name the file itself"):
        OPENING[option](tmp_path / "log")
    assert (tmp_path / "secret").read_text() == "of another program"


def test_a_file_is_for_its_owner_only(tmp_path: Path) -> None:
    os.close(open_output(tmp_path / "log"))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("keep", "append", "left"), [(False, False, b"new"), (True, True, b"oldnew")])
def test_what_was_there(keep: bool, append: bool, left: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"old")
    fd = open_output(tmp_path / "log", keep=keep, append=append)
    os.write(fd, b"new")
    os.close(fd)
    assert (tmp_path / "log").read_bytes() == left


def test_a_fifo_without_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address"):
        open_output(tmp_path / "fifo")
