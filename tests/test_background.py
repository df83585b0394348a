"""Tasks beside a block: which exceptions come out, when the block, its tasks, or both fail."""

import pytest
import trio
import trio.testing

from vfiouser_virtio.background import background


async def fails(error: BaseException) -> None:
    raise error


async def test_tasks_end_with_the_block() -> None:
    with trio.testing.assert_checkpoints():
        async with background() as tasks:
            tasks.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()


async def test_the_blocks_own_exception_comes_out_as_it_is() -> None:
    own = ValueError("own")

    async def block() -> None:
        async with background() as tasks:
            tasks.start_soon(trio.sleep_forever)
            raise own

    with pytest.raises(ValueError, match="own") as caught:
        await block()
    assert caught.value is own


async def test_a_tasks_exception_ends_the_block_as_it_is() -> None:
    async def block() -> None:
        async with background() as tasks:
            tasks.start_soon(fails, KeyError("task"))
            await trio.sleep_forever()

    with pytest.raises(KeyError, match="task"):
        await block()


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_neither_is_lost_where_both_fail(in_a_group: bool) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(ValueError, match="own"), pytest.RaisesExc(KeyError), flatten_subgroups=True
    ):
        async with background() as tasks:
            tasks.start_soon(fails, KeyError("task"))
            if in_a_group:
                async with trio.open_nursery() as inner:
                    # One of them by our cancellation, the other of itself, in the same turn.
                    inner.start_soon(trio.sleep_forever)
                    inner.start_soon(fails, ValueError("own"))
                    await trio.sleep_forever()
            else:
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                raise ValueError("own")


async def test_two_tasks_that_fail() -> None:
    with pytest.RaisesGroup(KeyError, ValueError):
        async with background() as tasks:
            tasks.start_soon(fails, KeyError("one"))
            tasks.start_soon(fails, ValueError("two"))
            await trio.sleep_forever()


async def test_a_block_that_is_cancelled_from_outside() -> None:
    with trio.CancelScope() as scope:
        async with background():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
