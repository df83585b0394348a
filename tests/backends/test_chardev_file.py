"""The file chardev, specs, and the pair for programs."""

import logging
import os
from pathlib import Path

import pytest
import trio

from vfiouser_virtio.backends.chardev import Null
from vfiouser_virtio.backends.chardev_spec import open_chardev
from vfiouser_virtio.backends.log_file import LogFile
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.backends.pty import Pty
from vfiouser_virtio.backends.unix_socket import UnixSocket
from vfiouser_virtio.errors import ConfigError, DeviceError


async def test_a_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for text in (b"first boot\n", b"second boot\n"):
        log = LogFile(path)
        await log.send(text)
        log.send_nowait(b"!")
        log.close()
    assert path.read_bytes() == b"first boot\n!second boot\n!"


async def test_a_full_disk_is_said_once_and_waits_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = LogFile(Path("/dev/full"))
    with trio.fail_after(60), caplog.at_level(logging.ERROR):
        await log.send(b"a")
        await log.send(b"b")
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "chardev: file:/dev/full: No space left on device; what the guest writes from now on is lost"
    ]


async def test_a_log_has_no_input(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    with trio.move_on_after(0.01) as scope:
        await log.receive()
    assert scope.cancelled_caught
    log.close()


def test_a_log_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="Is a directory"):
        LogFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DeviceError, match="a FIFO that nobody reads"):
        LogFile(tmp_path / "fifo")


def test_a_log_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        LogFile(tmp_path / "log").close()
    finally:
        os.umask(before)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600  # consoles see passwords


async def test_a_log_does_not_grow_beyond_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1234")
    for said in (True, False):
        caplog.clear()
        log = open_chardev(f"file:{path}", file_limit=10)
        with caplog.at_level(logging.ERROR):
            if said:
                await log.send(b"abcd")
                log.send_nowait(b"efgh")
            await log.send(b"ijkl")
            log.send_nowait(b"")
        log.close()
        assert path.read_bytes() == b"1234abcdef"
        assert [record.getMessage() for record in caplog.records] == [
            f"chardev: file:{path} has its full size; what the guest writes from now on is lost"
        ]


async def test_null_takes_everything_and_gives_nothing() -> None:
    null = Null()
    await null.send(b"x" * 1000)
    null.send_nowait(b"x")
    with trio.move_on_after(0.01) as scope:
        await null.receive()
    assert scope.cancelled_caught


async def test_a_pair_has_both_directions_and_an_end(nursery: trio.Nursery) -> None:
    chardev, stream = pair()
    nursery.start_soon(chardev.run)
    await stream.send_all(b"in")
    assert await chardev.receive() == b"in"
    await chardev.send(b"out")
    assert await stream.receive_some() == b"out"
    await stream.aclose()
    nursery.start_soon(chardev.receive)
    with trio.fail_after(60):
        while chardev.connected:
            await chardev.wait_changed()
    chardev.close()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("pty", Pty), ("pty:{}/p", Pty), ("unix:{}/s", UnixSocket), ("file:{}/f", LogFile), ("null", Null)],
)
def test_specs(tmp_path: Path, spec: str, kind: type) -> None:
    chardev = open_chardev(spec.format(tmp_path))
    assert isinstance(chardev, kind)
    chardev.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unx:/tmp/x", "did you mean unix?"),
        ("socket", "choose from stdio, pty, pty:LINK"),
        ("", "choose from"),
        ("unix", "needs a path: unix:/some/path"),
        ("file:", "needs a path"),
        ("null:/x", "null takes nothing after it"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        open_chardev(spec)
