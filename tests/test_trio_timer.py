"""Sleeps that are shorter than trio's."""

import os
from time import perf_counter

import pytest
import trio

from vfiouser_virtio.libc import libc
from vfiouser_virtio.trio_timer import sleep_briefly


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_it_sleeps_no_less_by_other_means_than_trio_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(trio, "sleep")
    before = open_fds()
    for seconds in (0.0, 1e-9, 100e-6, 2e-3, 1.001):
        start = perf_counter()
        await sleep_briefly(seconds)
        assert perf_counter() - start >= seconds
    assert open_fds() == before


async def test_it_can_be_cancelled() -> None:
    before = open_fds()
    with trio.move_on_after(0.01) as scope:
        await sleep_briefly(60)
    assert scope.cancelled_caught
    assert open_fds() == before


async def test_without_a_file_descriptor_it_sleeps_as_trio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "timerfd_create", lambda _clock, _flags: -1)
    start = perf_counter()
    await sleep_briefly(100e-6)
    assert perf_counter() - start >= 100e-6
