"""Where clients come from: socket paths with all that can lie there already, inherited fds, systemd."""

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.waiting import never_waits

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_user import ListenError, from_fd, from_systemd, listen_path, sd_notify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vu.sock"


@pytest.fixture
def fds() -> Iterator[list[int]]:
    fds: list[int] = []
    yield fds
    close_all(fds)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def one_line(error: Exception) -> str:
    assert isinstance(error, ConfigError)
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_only_its_owner_may_connect_whatever_the_umask(path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        listener = listen_path(path)
    finally:
        os.umask(previous)
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (listener.name, listener.connected) == (str(path), False)
        connect(path)
    assert list(path.parent.iterdir()) == []  # socket and lock are gone


def test_a_second_server_is_refused(path: Path) -> None:
    with listen_path(path):
        with pytest.raises(ListenError, match="another server does") as caught:
            listen_path(path)
        assert str(path) in one_line(caught.value)
        connect(path)  # the first is as before
    with listen_path(path):
        connect(path)


def test_the_socket_of_a_dead_server_is_replaced(path: Path) -> None:
    code = (
        "import os, sys; from vfiouser_virtio.vfio_user import listen_path; "
        "listen_path(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.is_socket()
    assert path.with_name("vu.sock.lock").exists()
    with listen_path(path):
        connect(path)
    assert list(path.parent.iterdir()) == []


def test_a_live_server_that_knows_no_lock_is_refused(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(ListenError, match="another program listens there") as caught:
            listen_path(path)
        one_line(caught.value)
        connect(path)
    assert not path.with_name("vu.sock.lock").exists()


def test_a_full_backlog_is_a_live_server(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as first:
        other.bind(str(path))
        other.listen(0)
        first.connect(str(path))
        with pytest.raises(ListenError, match="another program"):
            listen_path(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_a_socket_stays(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(ListenError, match="not a socket") as caught:
        listen_path(path)
    one_line(caught.value)
    assert path.is_symlink() if kind == "link" else path.exists()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["vu.sock"]


def test_the_length_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listen_path("x" * 107) as listener, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.name)
    with pytest.raises(ListenError, match="108 bytes, the system allows 107"):
        listen_path("x" * 108)
    with pytest.raises(ListenError, match="108 bytes"):
        listen_path("ä" * 54)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be(tmp_path: Path, path: Path) -> None:
    path.write_text("a file")
    for wrong in ("", "a\0b", tmp_path / "none" / "vu.sock", path / "vu.sock"):
        with pytest.raises(ListenError) as caught:
            listen_path(wrong)
        one_line(caught.value)


def test_somebody_elses_socket_is_not_removed(path: Path) -> None:
    with listen_path(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


def test_nothing_leaks_when_it_fails(path: Path) -> None:
    path.write_text("")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ListenError):
            listen_path(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_inherited_listening_socket(path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(1)
    fd = sock.detach()
    os.set_inheritable(fd, True)
    with from_fd(fd) as listener:
        assert (listener.name, listener.connected) == (f"fd {fd}", False)
        assert not os.get_inheritable(fd)
        connect(path)
    assert path.exists()  # not ours to remove
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_an_inherited_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, from_fd(theirs.detach(), "disk") as listener:
        assert (listener.name, listener.connected) == ("disk", True)


def test_inherited_fds_that_will_not_do(fds: list[int]) -> None:
    fds += [*os.pipe(), socket.socket(socket.AF_UNIX).detach(), socket.socket(socket.AF_INET).detach()]
    fds += [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()]
    for fd, why in zip(
        (fds[0], fds[2], fds[3], fds[4], 99_999, -1, 1 << 40),
        ("not a socket", "neither listens", "UNIX stream", "UNIX stream", "not open", "not open", "not open"),
        strict=True,
    ):
        with pytest.raises(ListenError, match=why) as caught:
            from_fd(fd)
        one_line(caught.value)
    for fd in fds:
        os.fstat(fd)  # still its owner's


def test_systemd(tmp_path: Path) -> None:
    # In a process of its own: the fds begin at 3, whatever those are here.
    code = """
import os, socket, sys
from vfiouser_virtio.vfio_user import from_systemd
paths = sys.argv[1:]
os.environ["LISTEN_PID"] = str(os.getpid())
listeners = from_systemd()
print([(l.name, l.connected, l.socket.getsockname(), os.get_inheritable(l.socket.fileno())) for l in listeners])
print([name for name in os.environ if name.startswith("LISTEN_")], from_systemd())
"""
    paths = [str(tmp_path / name) for name in ("a", "b")]
    sockets = []
    for path in paths:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(1)
        sockets.append(sock)
    script = f"import os, sys; os.dup2({sockets[0].fileno()}, 103); os.dup2({sockets[1].fileno()}, 104)\n"
    script += "os.dup2(103, 3); os.dup2(104, 4)\n" + code
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "disk"},
        pass_fds=[sock.fileno() for sock in sockets],
        capture_output=True,
        text=True,
        check=False,
    )
    for sock in sockets:
        sock.close()
    assert done.stdout.splitlines() == [
        str([("disk", False, paths[0], False), ("fd 4", False, paths[1], False)]),
        "[] []",
    ], done.stderr


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_PID": str(os.getpid())}],
    ids=["nothing", "no pid", "another process's", "no fds"],
)
def test_no_systemd(environ: dict[str, str]) -> None:
    assert from_systemd(environ) == []
    assert environ == {}


@pytest.mark.parametrize("count", ["x", "-1", "1e3", "99999999999"])
def test_systemd_out_of_its_mind(count: str) -> None:
    with pytest.raises(ListenError, match="LISTEN_FDS"):
        from_systemd({"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())})


@pytest.mark.parametrize("abstract", [False, True])
def test_sd_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@vfiouser-virtio-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert sd_notify("READY=1\nSTATUS=serving")
        assert manager.recv(100) == b"READY=1\nSTATUS=serving"


def test_sd_notify_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        told = 0
        while sd_notify("WATCHDOG=1"):
            told += 1
        assert told > 1


def test_sd_notify_without_a_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not sd_notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    assert not sd_notify("READY=1")


async def test_another_process_may_take_the_client_and_clear_o_nonblock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our accept(2), of a listening socket that whoever gave it to us has still."""
    theirs = socket.socket(socket.AF_UNIX)
    theirs.bind(str(path))
    theirs.listen()
    wait_readable = trio.lowlevel.wait_readable

    async def and_it_is_taken(sock: socket.socket) -> None:
        await wait_readable(sock)
        monkeypatch.undo()
        theirs.accept()[0].close()
        theirs.setblocking(True)

    with from_fd(os.dup(theirs.fileno())) as listener, never_waits():
        monkeypatch.setattr(trio.lowlevel, "wait_readable", and_it_is_taken)
        connect(path)
        accepted: list[socket.socket] = []

        async def accept() -> None:
            accepted.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            for _ in range(10):  # others have their turns
                await trio.sleep(0.01)
            assert not accepted
            connect(path)
    accepted[0].close()
    theirs.close()


def test_a_lock_that_another_user_has_left_in_a_sticky_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server that was killed leaves it with --run-as. With protected_regular, which a test cannot set."""
    lock = path.with_name("vu.sock.lock")
    lock.touch()
    really_open = os.open

    def protected(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and not flags & os.O_EXCL and os.path.exists(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return really_open(name, flags, mode)

    monkeypatch.setattr(os, "open", protected)
    with listen_path(str(path)):
        connect(path)
        assert lock.exists()
    assert not lock.exists()
