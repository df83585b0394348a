"""Benchmark of what supervision costs: `serve --supervise` beside `serve --processes`, and the pause of a death.

Neither is in a sandbox, whose cost is another one.
"""

import os
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.measure import Benchmark, Options, Row, turn
from benchmarks.ring_client import ReadQueue
from benchmarks.server import ServerProcess, server
from vfiouser_virtio.testing.raw.blocking import BlockingClient

_SUPERVISED, _APART = "--supervise", "--processes"
_HOW = {_SUPERVISED: ("--supervise", "--sandbox=off"), _APART: ("--processes",)}
_DEPTHS = (1, 16)
_REGISTER, _PAUSE = "a register's round trip", "a death, from SIGKILL to the next answer"


def run(options: Options) -> list[Row]:
    """Both in turn."""
    seconds = 0.05 if options.quick else 0.5
    figures: dict[str, dict[str, list[float]]] = {how: {} for how in _HOW}
    for number in range(options.rounds):
        for how in turn([*_HOW], number):
            options.progress(f"{how}, round {number + 1}")
            for metric, figure in _measured(how, seconds).items():
                figures[how].setdefault(metric, []).append(figure)
    options.note("medians; the disk is in memory, so that what the device itself does is little")
    ours, theirs = figures[_SUPERVISED], figures[_APART]
    return [
        *(Row(metric=metric, unit="us", ours=ours[metric], theirs={_APART: theirs[metric]}) for metric in theirs),
        Row(metric=_PAUSE, unit="ms", ours=ours[_PAUSE]),
    ]


def _measured(how: str, seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    with server(["blk,size=16M"], *_HOW[how]) as running, BlockingClient(running.paths[0]) as client:
        client.start()
        found[_REGISTER] = _median_us(client.status, seconds)
    for depth in _DEPTHS:
        with server(["blk,size=16M"], *_HOW[how]) as running, BlockingClient(running.paths[0]) as client:
            client.negotiate()
            queue = ReadQueue(client, 0, depth=depth, size=4096, segments=1)
            client.set("device_status", 15)
            took = _median_us(partial(_fill, queue), seconds)
            found[f"a read of 4 KiB, {depth} at a time"] = took / depth
    if how == _SUPERVISED:
        with server(["rng"], *_HOW[how]) as running, BlockingClient(running.paths[0]) as client:
            client.start()
            os.kill(_device_process(running), signal.SIGKILL)
            begin = time.perf_counter()
            client.status()
            found[_PAUSE] = (time.perf_counter() - begin) * 1e3
    return found


def _fill(queue: ReadQueue) -> None:
    queue.submit()
    while not queue.done:
        os.sched_yield()


def _median_us(work: Callable[[], object], seconds: float) -> float:
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or not took:
        work()
        took.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(took)


def _device_process(running: ServerProcess) -> int:
    """That of the only device: the child of its keeper."""
    pid = running.process.pid
    for _ in range(2):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


BENCHMARK = Benchmark(
    name="supervision", summary="registers and requests with --supervise, and the pause of a death", run=run
)
