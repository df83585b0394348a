"""The threads of a disk: results, errors, cancellation before and after a call has begun, and their end."""

import threading
import time

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.workers import Workers


async def test_result_and_error() -> None:
    workers = Workers("test")

    def fail() -> int:
        raise OSError(5, "so be it")

    assert await workers.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(OSError, match="so be it"):
        await workers.run(fail)
    workers.close()


async def test_no_more_threads_than_needed_or_allowed() -> None:
    workers = Workers("counted", limit=3)
    for _ in range(5):
        await workers.run(int)
    assert _alive("counted") == 1
    gate = threading.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(workers.run, gate.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert _alive("counted") == 3
        gate.set()
    workers.close()
    with trio.fail_after(60):
        while _alive("counted"):
            await trio.sleep(0.01)


async def test_a_call_that_has_begun_is_waited_for() -> None:
    workers = Workers("test")
    begun, ended = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, call)
        while not begun.is_set():
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert ended.is_set()
    workers.close()


async def test_a_call_that_has_not_begun_can_be_cancelled() -> None:
    workers = Workers("test", limit=1)
    gate, ran = threading.Event(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, gate.wait)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.01) as scope:
            await workers.run(lambda: ran.append(1))
        assert scope.cancelled_caught
        gate.set()
    await workers.run(int)
    assert not ran
    workers.close()


def _alive(name: str) -> int:
    return sum(thread.name.startswith(f"{name}-") for thread in threading.enumerate())
