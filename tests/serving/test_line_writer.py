"""Lines to a descriptor whose reader comes late, goes, or never comes."""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vfiouser_virtio.serving.line_writer import LineWriter

PATIENCE = 30


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe with room for one page: (read end, write end)."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            pass


def lost(count: int) -> str:
    return f"{count} lost"


def read_all(reading: int, until: bytes) -> bytes:
    data = b""
    while not data.endswith(until):
        data += os.read(reading, 4096)
    return data


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "line-writer"]


def test_lines_come_in_order_and_whole(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = LineWriter(writing, lost=lost)
    lines = [f"{number} {'x' * (number % 300)}\n" for number in range(1000)] + ["y" * 10_000 + "\n", "end\n"]
    for line in lines:
        writer.write(line)
    assert read_all(reading, b"end\n").decode() == "".join(lines)
    assert writer.flush(PATIENCE)


def test_what_finds_no_room_is_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = LineWriter(writing, room=20_000, lost=lost)
    for number in range(1000):
        writer.write(f"{number:99}\n")
    assert not writer.flush(0.01)
    data = b""
    while b"lost\n" not in data:
        data += os.read(reading, 4096)
    writer.write("end\n")
    data += read_all(reading, b"end\n")
    following, gaps = 0, 0
    for line in data.decode().splitlines()[:-1]:
        if line.endswith("lost"):  # in the place of what is missing
            following += int(line.split()[0])
            gaps += 1
        else:
            assert int(line) == following
            following += 1
    assert following == 1000
    assert gaps >= 1
    assert len(data) < 50_000


def test_nobody_who_writes_or_forks_waits_for_a_reader(pipe: tuple[int, int]) -> None:
    """A write to the pipe itself would never return."""
    _, writing = pipe
    writer = LineWriter(writing, room=1 << 20, lost=lost)
    for _ in range(10_000):
        writer.write("x" * 99 + "\n")
    assert not writer.flush(0.01)


def test_a_reader_that_is_gone_costs_nothing(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    failures: list[OSError] = []
    writer = LineWriter(writing, lost=lost, failed=failures.append)
    os.close(reading)
    for _ in range(100):
        writer.write("x\n")
    wait_until(lambda: bool(failures))
    assert isinstance(failures[0], BrokenPipeError)
    writer.flush(PATIENCE)
    writer.write("y\n")
    wait_until(lambda: not writers())
    assert len(failures) == 1


def test_a_descriptor_that_somebody_made_non_blocking(pipe: tuple[int, int]) -> None:
    """Node does that to the stderr that it shares with us."""
    reading, writing = pipe
    os.set_blocking(writing, False)
    writer = LineWriter(writing, lost=lost)
    writer.write("x" * 20_000 + "\nend\n")
    assert len(read_all(reading, b"end\n")) == 20_005


def test_a_thread_with_nothing_to_do_ends(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiouser_virtio.serving.line_writer.IDLE", 0.01)
    reading, writing = pipe
    said: list[int] = []

    def idle() -> float | None:
        said.append(1)
        if len(said) == 3:
            writer.write("from idle\n")
        return 0.001 if len(said) < 5 else None

    writer = LineWriter(writing, lost=lost, idle=idle)
    writer.write("one\n")
    assert read_all(reading, b"idle\n") == b"one\nfrom idle\n"
    wait_until(lambda: not writers())
    writer.write("two\n")
    assert read_all(reading, b"two\n") == b"two\n"


def test_a_forked_process_writes_its_own_lines_only(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = LineWriter(writing, lost=lost)
    writer.write("before\n")
    read_all(reading, b"before\n")
    writer.write("parent\n" * 2000)  # more than the pipe takes
    pid = os.fork()
    if pid == 0:
        writer.write("child\n")
        os._exit(0 if not writer.flush(0.1) else 1)  # the pipe is full
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    writer.write("end\n")
    assert read_all(reading, b"end\n") == b"parent\n" * 2000 + b"end\n"


def test_it_writes_where_no_thread_can_be_started(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At Python's end, for one."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    reading, writing = pipe
    writer = LineWriter(writing, lost=lost)
    writer.write("last words\n")
    assert writer.flush(PATIENCE)
    assert os.read(reading, 100) == b"last words\n"
    writer.write("x" * 20_000 + "\n")
    assert not writer.flush(0.01)
