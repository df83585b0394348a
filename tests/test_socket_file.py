"""Sockets with a path: who may connect, what is replaced, and what is removed."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_virtio.socket_file import bind_path


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "dgram"])
def sock(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, request.param) as sock:
        yield sock


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_the_mode_is_not_the_umasks(sock: socket.socket, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bind_path(sock, tmp_path / "s")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").lstat().st_mode) == 0o600


def test_nothing_is_left_of_what_fails_after_its_bind(
    sock: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "chmod", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        bind_path(sock, tmp_path / "s")
    assert not os.listdir(tmp_path)


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(sock: socket.socket, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, sock.type) as dead:
        dead.bind(str(tmp_path / "s"))
    bind_path(sock, tmp_path / "s")
    if sock.type == socket.SOCK_STREAM:
        sock.listen()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with (
            socket.socket(socket.AF_UNIX, kind) as other,
            pytest.raises(OSError, match="another program listens there"),
        ):
            bind_path(other, tmp_path / "s")


def test_a_link_is_no_socket_even_to_a_dead_one(sock: socket.socket, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, sock.type) as dead:
        dead.bind(str(tmp_path / "dead"))
    (tmp_path / "s").symlink_to(tmp_path / "dead")
    with pytest.raises(OSError, match="something that is not a socket has that name"):
        bind_path(sock, tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead", "s"]


def test_only_our_own_file_is_removed(sock: socket.socket, tmp_path: Path) -> None:
    file = bind_path(sock, tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / "moved")
    file.remove()  # there is none
    with socket.socket(socket.AF_UNIX, sock.type) as other:
        theirs = bind_path(other, tmp_path / "s")
    file.remove()
    assert (tmp_path / "s").is_socket()
    theirs.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
