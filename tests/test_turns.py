"""Busy tasks share the event loop: rounds of the loop are counted, and time is what the test says."""

import pytest
import trio

from vfiouser_virtio import turns as module
from vfiouser_virtio.turns import SHARE, SLICE, turns


class Loop(trio.abc.Instrument):
    """Counts the rounds of the loop, and is the clock."""

    def __init__(self) -> None:
        self.round = 0
        self.now = 100.0

    def after_io_wait(self, timeout: float) -> None:
        self.round += 1


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(module, "perf_counter", lambda: made.now)
    return made


async def test_one_of_the_line_goes_on_in_a_round(loop: Loop) -> None:
    trio.lowlevel.add_instrument(loop)
    went_on: list[tuple[int, int]] = []

    async def busy(number: int) -> None:
        await trio.lowlevel.checkpoint()
        for _ in range(20):
            await turns().wait()
            went_on.append((loop.round, number))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(busy, number)
    rounds = [each for each, _ in went_on]
    assert len(set(rounds)) == len(rounds) == 100
    # In order: nobody goes on twice while another waits.
    order = [number for _, number in went_on]
    assert all(set(order[at : at + 5]) == set(range(5)) for at in range(0, 95, 5))


async def test_those_that_are_woken_together_share_a_slice(loop: Loop) -> None:
    shared = turns()
    end, first = shared.woken(0)
    assert end == pytest.approx(100 + SLICE)
    loop.now += SLICE / 2
    assert shared.woken(0) == (end, first)
    loop.now += SLICE
    end, joined = shared.woken(0)
    assert end == pytest.approx(loop.now + SHARE)
    assert joined == first
    # Who comes again has been woken in the next round of the loop.
    end, second = shared.woken(first)
    assert end == pytest.approx(loop.now + SLICE)
    assert second != first
    assert shared.woken(first) == (end, second)
    assert await shared.wait() == pytest.approx(loop.now + SLICE)


async def test_a_round_of_the_loop_takes_no_longer_than_a_slice_and_the_shares(loop: Loop) -> None:
    trio.lowlevel.add_instrument(loop)
    took: dict[int, float] = {}

    async def busy() -> None:
        last = 0
        for _ in range(50):
            await trio.lowlevel.checkpoint()
            end, last = turns().woken(last)
            took[loop.round] = took.get(loop.round, 0) + end - loop.now
            loop.now = end  # all that it is given

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(busy)
    assert len(took) == 50
    assert max(took.values()) <= SLICE + 10 * SHARE
    assert min(took.values()) >= SLICE


async def test_who_is_cancelled_leaves_the_line_and_the_others_go_on() -> None:
    done: list[int] = []

    async def busy(number: int, scope: trio.CancelScope) -> None:
        with scope:
            for _ in range(10):
                await turns().wait()
            done.append(number)

    scopes = [trio.CancelScope() for _ in range(6)]
    async with trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(busy, number, scope)
        await trio.lowlevel.checkpoint()
        for scope in scopes[::2]:
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert sorted(done) == [1, 3, 5]
    with trio.CancelScope() as scope:  # the first of an empty line
        scope.cancel()
        await turns().wait()
    await turns().wait()


def test_each_run_has_its_own() -> None:
    async def main() -> module.Turns:
        assert turns() is turns()
        await turns().wait()
        return turns()

    assert trio.run(main) is not trio.run(main)
