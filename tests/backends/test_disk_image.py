"""Disk images: the lock that keeps two servers from writing to one."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_virtio.backends import disk_image
from vfiouser_virtio.backends.disk_image import lock_image, open_image
from vfiouser_virtio.errors import DeviceError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    return path


@pytest.fixture
def held(image: Path) -> Iterator[int]:
    """The file descriptor of another server, which has the image."""
    fd = open_image(image, readonly=False)
    assert lock_image(fd, image, readonly=False) == []
    yield fd
    os.close(fd)


def test_an_image_that_another_server_writes_to(image: Path, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_image, "LOCK_PATIENCE", 0.0)
    fd = open_image(image, readonly=True)
    with pytest.raises(DeviceError, match=r"disk\.img is in use by another server or QEMU \(it is locked\)"):
        lock_image(fd, image, readonly=True)
    os.close(fd)


def test_the_lock_of_a_killed_server_is_waited_for(image: Path, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of its io_uring hold the file some time longer than it lives."""
    null = os.open(os.devnull, os.O_RDONLY)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.dup2(null, held)  # which closes it

    monkeypatch.setattr(time, "sleep", sleep)
    fd = open_image(image, readonly=False)
    assert lock_image(fd, image, readonly=False) == []
    assert len(slept) == 3
    os.close(fd)
    os.close(null)


def test_readers_share_an_image(image: Path) -> None:
    fds = [open_image(image, readonly=True) for _ in range(2)]
    assert [lock_image(fd, image, readonly=True) for fd in fds] == [[], []]
    for fd in fds:
        os.close(fd)


def test_a_file_system_without_locks_is_said(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.fcntl", no_locks)
    fd = open_image(image, readonly=False)
    assert lock_image(fd, image, readonly=False) == [
        f"{image} cannot be locked (No locks available): nothing keeps others from writing to it"
    ]
    os.close(fd)
