"""`watch`: every event is handled, none twice, and a number that is another file's by now is not looked at."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from vfiouser_virtio.eventfd_watch import watch


@pytest.fixture(params=[os.EFD_NONBLOCK, 0], ids=["nonblocking", "blocking"])
def fd(request: pytest.FixtureRequest) -> Iterator[int]:
    made = os.eventfd(0, os.EFD_CLOEXEC | request.param)
    yield made
    os.close(made)


async def test_each_time_is_handled_and_drained(fd: int, nursery: trio.Nursery) -> None:
    calls: list[int] = []
    nursery.start_soon(watch, fd, lambda: calls.append(1))
    for number in range(1, 4):
        os.eventfd_write(fd, number)
        await trio.testing.wait_all_tasks_blocked()
        assert len(calls) == number, "drained, so that waiting for it does not spin"


async def test_what_the_handler_returns_is_awaited(fd: int, nursery: trio.Nursery) -> None:
    going_on, ended = trio.Event(), []

    async def work() -> None:
        await going_on.wait()
        ended.append(1)

    nursery.start_soon(watch, fd, work)
    os.eventfd_write(fd, 1)
    await trio.testing.wait_all_tasks_blocked()
    os.eventfd_write(fd, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert not ended
    going_on.set()
    await trio.testing.wait_all_tasks_blocked()
    assert ended == [1, 1]


async def test_it_ends_when_the_eventfd_is_closed(fd: int) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, fd, lambda: None)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(fd)


async def test_a_number_that_is_not_valid_any_more_is_not_read(fd: int) -> None:
    """The eventfd is closed after the wake-up, before the task has its turn: its number may be another file's."""
    calls: list[int] = []
    valid = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: watch(fd, lambda: calls.append(1), valid=lambda: valid))
        await trio.testing.wait_all_tasks_blocked()
        os.eventfd_write(fd, 1)
        valid = False
    assert not calls
    assert os.eventfd_read(fd) == 1


async def test_one_that_somebody_else_has_emptied_is_not_waited_for(
    fd: int, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    waited = 0

    async def wait_readable(_fd: int) -> None:
        nonlocal waited
        waited += 1
        if waited > 3:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    nursery.start_soon(watch, fd, lambda: calls.append(1))
    await trio.testing.wait_all_tasks_blocked()
    assert (waited, calls) == (4, [])
