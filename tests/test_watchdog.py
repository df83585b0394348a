"""The watchdog, with an event loop that the test stops."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.watchdog import TaskPlace, watchdog, where

PATIENCE = 60


class Ticks(trio.abc.Instrument):
    """How often the loop wakes."""

    count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextmanager
def ticks() -> Iterator[Ticks]:
    found = Ticks()
    trio.lowlevel.add_instrument(found)
    yield found
    trio.lowlevel.remove_instrument(found)


async def test_a_task_that_does_not_yield_is_found_and_its_end_noticed() -> None:
    silences: list[float] = []
    places: list[TaskPlace] = []
    enough, back = threading.Event(), threading.Event()
    loop = threading.get_ident()

    def stuck(seconds: float) -> None:
        silences.append(seconds)
        places.append(where(loop))
        if len(silences) == 3:
            enough.set()

    def does_not_yield() -> None:
        assert enough.wait(PATIENCE)

    with watchdog(stuck, back=back.set):
        await trio.lowlevel.checkpoint()
        does_not_yield()
        with trio.fail_after(PATIENCE):
            while not back.is_set():
                await trio.sleep(0.01)
    assert silences[:3] == pytest.approx([0.2, 0.4, 0.6])
    # A fourth may be seen when it has ended, before this loop has got a turn.
    assert {place.innermost.rpartition(":")[2].split(" ", 1)[1] for place in places[:3]} == {"in does_not_yield"}
    assert places[0].innermost.startswith(__file__)
    # Ours, and how far the library is with it; nothing of trio.
    assert [line.split('"')[1] for line in places[0].lines.splitlines() if line.startswith("  File")][-2:] == [
        __file__
    ] * 2
    assert places[0].lines.splitlines()[-1].startswith("  (now in ")
    assert "in wait)" in places[0].lines


async def test_an_idle_loop_is_left_in_peace() -> None:
    with watchdog(lambda seconds: None):
        with ticks() as idle:
            await trio.sleep(3)
        assert idle.count <= 2  # one question, for it was at work, and the end of our own sleep
        with ticks() as busy:
            with trio.fail_after(PATIENCE):
                while busy.count <= 20:
                    await trio.sleep(0.001)  # and nothing becomes of it


async def test_signals_are_heard_while_nobody_else_can() -> None:
    heard: list[int] = []
    numbers = threading.Event()

    def signalled(number: int) -> None:
        heard.append(number)
        numbers.set()

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with watchdog(lambda seconds: None, signalled=signalled) as wakeup:
            trios = signal.set_wakeup_fd(wakeup)
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert numbers.wait(PATIENCE)
            finally:
                signal.set_wakeup_fd(trios, warn_on_full_buffer=False)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


async def test_nothing_is_left_of_it() -> None:
    descriptors, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        with watchdog(lambda seconds: None):
            await trio.lowlevel.checkpoint()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(0.01)  # a question that nobody waits for any more does no harm
