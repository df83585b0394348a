"""What the other tests of garbage measure with; exceptions that go from one place to another."""

import pytest
import trio
from support.garbage import check_no_garbage, until_3_11

from vfiouser_virtio.backends.workers import Workers
from vfiouser_virtio.background import background


async def in_a_local_variable() -> None:
    try:
        raise ValueError("kept")
    except ValueError as error:
        kept = error
    assert kept


async def test_garbage_is_found() -> None:
    with pytest.raises(AssertionError, match=r"objects of cyclic garbage each time: .*frame of in_a_local_variable"):
        await check_no_garbage(in_a_local_variable)


async def test_what_is_left_once_may_be() -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        turns += 1
        await trio.lowlevel.checkpoint()
        if turns == 50:
            await in_a_local_variable()

    await check_no_garbage(turn)
    assert turns > 50


async def fails() -> None:
    raise KeyError("task")


# Not of a task while the block waits: trio's frames have the failure, contextlib's what has cancelled the block for it.
async def of_a_block() -> None:
    async with background() as tasks:
        tasks.start_soon(trio.sleep_forever)
        await trio.lowlevel.checkpoint()
        raise KeyError("block")


async def of_both() -> None:
    async with background() as tasks:
        tasks.start_soon(fails)
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        raise KeyError("block")


async def of_a_thread() -> None:
    def call() -> None:
        raise KeyError("thread")

    workers = Workers("test")
    try:
        await workers.run(call)
    finally:
        workers.close()


@pytest.mark.parametrize("work", [of_a_block, pytest.param(of_both, marks=until_3_11), of_a_thread])
async def test_exceptions_that_are_handed_on(work: object) -> None:
    async def turn() -> None:
        try:
            await work()  # type: ignore[operator]
        except* KeyError:
            pass

    await check_no_garbage(turn)


@until_3_11
async def test_a_block_that_is_cancelled_from_outside() -> None:
    async def turn() -> None:
        with trio.CancelScope() as scope:
            async with background() as tasks:
                tasks.start_soon(trio.sleep_forever)
                scope.cancel()
                await trio.sleep_forever()

    await check_no_garbage(turn)
