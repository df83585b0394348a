"""Eventfds whose flags and counters somebody else changes in the very moment: no call waits, no event is lost.

The races are made certain: what the look at the flag or at the counter says is patched to be out of date.
"""

import errno
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from vfiouser_virtio import eventfds
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.eventfds import Signaller, is_eventfd, signal, take
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci

_FULL = (1 << 64) - 2
NO_SYSTEM_CALL = 0x7FFF


@pytest.fixture
def fd() -> Iterator[int]:
    """An eventfd whose O_NONBLOCK the client has cleared."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    yield eventfd
    os.close(eventfd)


def signals(fd: int, count: int, signal: Callable[[int], None] = signal) -> None:
    for _ in range(count):
        signal(fd)


def does_not_wait(call: Callable[[], object], fd: int, *, unblock: Callable[[int], object]) -> None:
    """``call`` in a thread, which ``unblock`` lets go where it waits after all."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(15)
    waited = thread.is_alive()
    if waited:
        unblock(fd)
        thread.join()
    assert not waited
    assert not errors


def counted(fd: int) -> int:
    return os.eventfd_read(fd) if select.select([fd], [], [], 0)[0] else 0


def test_a_full_counter_is_not_waited_for_whatever_the_flag_said(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.eventfd_write(fd, _FULL)
    # Cleared right after we had looked.
    monkeypatch.setattr(os, "get_blocking", lambda _: False)
    does_not_wait(partial(signals, fd, 3), fd, unblock=os.eventfd_read)
    assert os.eventfd_read(fd) == _FULL + 1
    signal(fd)
    assert os.eventfd_read(fd) == 1


def test_no_event_is_lost_when_the_kernel_has_no_more_room_for_answers(fd: int) -> None:
    for _ in range(5000):  # there is room for some hundred
        signal(fd)
    assert counted(fd) == 5000


def test_threads_signal_at_the_same_time(fd: int) -> None:
    others = [os.eventfd(0) for _ in range(4)]
    threads = [threading.Thread(target=signals, args=(fd, 3000)) for fd in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [counted(other) for other in others] == [3000] * 4
    for other in others:
        os.close(other)


def test_a_number_that_is_another_eventfd_now(fd: int) -> None:
    signal(fd)
    other = os.eventfd(0)
    os.dup2(other, fd)
    signal(fd)
    assert counted(other) == 1
    os.close(other)


def test_what_is_no_eventfd_or_is_closed_is_an_error() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno follows
        signal(writer)
    assert caught.value.errno == errno.EINVAL
    assert not is_eventfd(writer)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno follows
        signal(writer)
    assert caught.value.errno == errno.EBADF


def test_a_child_after_a_fork_has_its_own(fd: int) -> None:
    signal(fd)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal(fd)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    signal(fd)
    assert counted(fd) == 3


OTHER_DEV_NULL = """\
import os
from types import SimpleNamespace

stat = os.stat
os.stat = lambda path, **named: SimpleNamespace(st_rdev=0) if path == "/dev/null" else stat(path, **named)

from vfiouser_virtio.eventfds import signal

fd = os.eventfd(0)
for _ in range(1000):
    signal(fd)
assert os.eventfd_read(fd) == 1000
mine = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
print([os.readlink(path) for path in mine if os.path.lexists(path)])
"""


def test_an_event_is_signalled_where_dev_null_is_something_else() -> None:
    """In a process of its own: what is signalled by is opened once."""
    opened = subprocess.run([sys.executable, "-c", OTHER_DEV_NULL], capture_output=True, text=True, check=True).stdout
    assert "/memfd:vfiouser-virtio: nothing" in opened


def test_an_empty_counter_is_not_waited_for(fd: int) -> None:
    does_not_wait(lambda: take(fd), fd, unblock=lambda fd: os.eventfd_write(fd, 1))
    os.eventfd_write(fd, 7)
    assert take(fd)
    assert counted(fd) == 0
    assert not take(fd)


async def test_the_count_of_an_ioeventfd_is_taken_before_we_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_readable = trio.lowlevel.wait_readable
    woken: list[int] = []

    async def woken_too_late(fd: Any) -> None:
        if not woken and is_eventfd(fd):
            woken.append(fd)
            await trio.lowlevel.checkpoint()
        else:
            await wait_readable(fd)

    function = VirtioPci(Rng())
    kicked = trio.Event()
    monkeypatch.setattr(function.core.queues[0], "kick", kicked.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(trio.lowlevel, "wait_readable", woken_too_late)
        fd = function.io_fds(VIRTIO_BAR)[0].fd
        os.set_blocking(fd, True)
        rescue = threading.Timer(15, os.eventfd_write, (fd, 1))
        rescue.start()
        try:
            await trio.testing.wait_all_tasks_blocked()
            assert rescue.is_alive(), "the event loop was blocked until somebody signalled"
            assert len(woken) == 1
            assert not kicked.is_set()
            os.eventfd_write(fd, 1)
            await kicked.wait()
        finally:
            rescue.cancel()
        nursery.cancel_scope.cancel()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "eventfd"]


class TestWithoutAsynchronousIo:
    """A container whose seccomp filter refuses io_setup(2), or fs.aio-max-nr used up."""

    @pytest.fixture
    def signal(self) -> Iterator[Callable[[int], None]]:
        yield Signaller((NO_SYSTEM_CALL, NO_SYSTEM_CALL, NO_SYSTEM_CALL)).signal
        # A thread ends only after its event has been seen.
        for _ in range(1500):
            if not writers():
                break
            threading.Event().wait(0.01)
        assert not writers()

    def test_events_arrive(self, fd: int, signal: Callable[[int], None]) -> None:
        signal(fd)
        assert select.select([fd], [], [], 15)[0]
        assert counted(fd) == 1

    def test_a_full_counter_is_not_waited_for(
        self, fd: int, signal: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        os.eventfd_write(fd, _FULL)
        signal(fd)
        assert not writers()

        class Stale:
            def register(self, *_: object) -> None: ...

            def poll(self, *_: object) -> list[object]:
                return [1]  # there was room, a moment ago

        monkeypatch.setattr(select, "poll", Stale)
        does_not_wait(partial(signals, fd, eventfds.MOST_THREADS, signal), fd, unblock=lambda fd: os.eventfd_read(fd))
        other = os.eventfd(0)
        signal(other)  # a neighbour's event: the counter is read down for it
        assert select.select([other], [], [], 15)[0]
        assert counted(other) == 1
        os.close(other)
