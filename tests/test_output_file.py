"""Files that are written: for their owner only, never through a link, or what the shell has opened; and not endless."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiouser_virtio.backends.log_file import LogFile
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.cli.audit_report import AuditReport
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.output_file import LimitedLines, open_file, open_output, write_all, write_report
from vfiouser_virtio.protocols.vfio_user import Command, Direction
from vfiouser_virtio.serving.decode import virtio_register
from vfiouser_virtio.serving.fault_log import BURNDOWN_LIMIT, burndown_log, fault_log
from vfiouser_virtio.serving.trace import TraceLog
from vfiouser_virtio.vfio_user import Message

OPENING: dict[str, Callable[[Path], object]] = {
    "chardev": LogFile,
    "dump": lambda path: RecordedNetdev(NullNetdev(), dump=path),
    "fault-log": fault_log,
    "burndown": burndown_log,
    "trace": lambda path: TraceLog(str(path), as_json=False, limit=1 << 20),
    "audit": lambda path: AuditReport(str(path)),
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
    fd = open_file(tmp_path / "log", keep=keep, append=append)
    os.write(fd, b"new")
    os.close(fd)
    assert (tmp_path / "log").read_bytes() == left


def test_a_fifo_without_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="is a FIFO that nobody reads"):
        open_output(tmp_path / "fifo")


@contextlib.contextmanager
def given(fd: int) -> Iterator[int]:
    """As what the shell opens for a program."""
    os.set_inheritable(fd, True)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_pipe_that_the_shell_has_made(folder: str) -> None:
    """Nobody else who has it finds it non-blocking."""
    reader, writer = os.pipe()
    with given(writer):
        ours = open_output(f"{folder}/{writer}")
        assert os.get_blocking(writer)
    write_all(ours, b"one")
    assert os.read(reader, 10) == b"one"
    os.close(ours)
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_file_that_the_shell_has_opened(tmp_path: Path) -> None:
    """It is written where others have got to, and not emptied."""
    with given(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT, 0o600)) as fd:
        os.write(fd, b"others' ")
        ours = open_output(f"/dev/fd/{fd}")
        write_all(ours, b"ours ")
        os.close(ours)
        os.write(fd, b"others'")
    assert (tmp_path / "log").read_text() == "others' ours others'"


def test_a_report_in_the_file_of_standard_output(tmp_path: Path) -> None:
    """`--junit /dev/stdout >log`: what was printed before stays, and what comes later goes behind it."""
    with given(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT, 0o600)) as fd:
        os.write(fd, b"printed ")
        write_report(f"/dev/fd/{fd}", "report ")
        os.write(fd, b"printed")
    assert (tmp_path / "log").read_text() == "printed report printed"


def test_a_report_for_others(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "report")
    for text in ("longer", "short"):
        write_report(tmp_path / "link", text)
    assert (tmp_path / "report").read_text() == "short"
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o666


def test_a_socket_that_was_handed_over() -> None:
    """It cannot be opened anew."""
    near, far = socket.socketpair()
    with given(near.detach()) as fd:
        ours = open_output(f"/dev/fd/{fd}")
        write_all(ours, b"one")
        os.close(ours)
    assert far.recv(10) == b"one"
    far.close()


def test_standard_streams_and_devices() -> None:
    for name in ("/dev/stdout", "/dev/stderr", "/dev/null"):
        os.close(open_output(name))


def test_a_descriptor_that_was_not_given() -> None:
    """A disk image of ours, a client's socket: whatever has the number that the user has mistaken."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    for fd in (reader, writer, 999_999_999):
        with pytest.raises(OSError, match=f"descriptor {fd} was not given to this program, or not for writing"):
            open_output(f"/dev/fd/{fd}")
    os.close(reader)
    os.close(writer)


def test_a_console_writes_to_no_descriptor(tmp_path: Path) -> None:
    with (
        given(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT, 0o600)) as fd,
        pytest.raises(DeviceError, match="is a symbolic link"),
    ):
        LogFile(Path(f"/dev/fd/{fd}"))


def test_a_reader_that_does_not_read() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(OSError, match="what is written to it is not read"):
        write_all(writer, bytes(1 << 20), patience_ms=1)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_all(writer, b"one")
    os.close(writer)


def test_lines_have_a_limit_in_bytes() -> None:
    lines: list[str] = []
    write = LimitedLines(lines.append, 10, "end")
    for _ in range(100):
        write("→ 1\n")  # 6 bytes
    assert lines == ["→ 1\n", "→ 1\n", "end\n"]


def test_what_forked_processes_write_counts_too() -> None:
    """However often one is started again; the last line comes once."""
    script = """
import os
from vfiouser_virtio.output_file import LimitedLines
write = LimitedLines(lambda line: os.write(1, line.encode()), 10, "end")
for process in range(4):
    if not os.fork():
        write(f"from {process}\\n")
        os._exit(0)
    os.wait()
write("late\\n")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["from 0", "from 1", "end"]


def test_a_trace_that_has_ended_decodes_nothing(tmp_path: Path) -> None:
    """It holds up what is served no more."""
    log = TraceLog(str(tmp_path / "log"), as_json=False, limit=1)
    asked: list[Message] = []

    def words_of(message: Message) -> list[str]:
        asked.append(message)
        return []

    log.know_registers("card", virtio_register, words_of)
    trace = log("card")
    for number in range(3):
        trace(Direction.CLIENT_TO_SERVER, Message(number, Command.DEVICE_RESET, 0, 0, b""))
    assert len(asked) == 1


def test_a_burndown_has_a_limit(tmp_path: Path) -> None:
    """A client that connects and leaves in a loop."""
    write = burndown_log(tmp_path / "log")
    write(f"{'x' * (BURNDOWN_LIMIT - 10)}\n")  # more than waits for the disk: dropped, and counted all the same
    for _ in range(20):
        write("y\n")
    while "truncated" not in (text := (tmp_path / "log").read_text()) or not text.endswith("\n"):
        time.sleep(0.01)  # its thread writes
    assert text.count("y\n") == 5
    assert json.loads(text.splitlines()[-1]) == {"event": "truncated", "bytes": BURNDOWN_LIMIT}
