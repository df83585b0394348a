"""Benchmark of a busy device's neighbour: in one process with it, and with `serve --processes`."""

import multiprocessing
import multiprocessing.synchronize
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.measure import Benchmark, Options, Row, at_most, turn
from benchmarks.ring_client import ReadQueue
from benchmarks.server import server
from vfiouser_virtio.testing.raw.blocking import BlockingClient

_DEVICES = ("blk,size=16M", "blk,size=16M")


def run(options: Options) -> list[Row]:
    """The neighbour's register round trips: together and apart, while the other is busy, and while it is idle."""
    cases = {
        "apart": (["--processes"], True),
        "in one process": ([], True),
        "apart, other idle": (["--processes"], False),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(options.rounds):
        for name in turn(list(cases), number):
            options.progress(f"{name}, round {number + 1}")
            how, busy = cases[name]
            figures[name].append(_neighbour(how, busy, 0.1 if options.quick else 0.5))
    options.note("round trips of a register of one device, while another one is busy with reads of 256 KiB")
    return [
        _row("median, with --processes", {name: [p50 for p50, _ in those] for name, those in figures.items()}),
        _row("99th percentile, with --processes", {name: [p99 for _, p99 in those] for name, those in figures.items()}),
    ]


def _row(metric: str, figures: dict[str, list[float]]) -> Row:
    ours = figures.pop("apart")
    return Row(metric=metric, unit="us", ours=ours, theirs=figures, targets={"in one process": at_most(1.0)})


def _neighbour(how: list[str], busy: bool, seconds: float) -> tuple[float, float]:
    """Median and 99th percentile of round trips, in µs."""
    with server(_DEVICES, *how) as running, BlockingClient(running.paths[1]) as client:
        client.start()
        if not busy:
            return _round_trips(client, seconds)
        with _keeping_busy(running.paths[0]):
            return _round_trips(client, seconds)


@contextmanager
def _keeping_busy(path: str) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    at_work = context.Event()
    process = context.Process(target=_keep_busy, args=(path, at_work), daemon=True)
    process.start()
    try:
        at_work.wait()
        yield
    finally:
        process.kill()
        process.join()


def _keep_busy(path: str, at_work: multiprocessing.synchronize.Event) -> None:
    """Reads of 256 KiB, several at a time: they cost the server a CPU, and us little."""
    with BlockingClient(path) as client:
        client.negotiate()
        queue = ReadQueue(client, 0, depth=16, size=256 << 10, segments=1)
        client.set("device_status", 15)
        at_work.set()
        while True:
            queue.submit()
            while not queue.done:
                time.sleep(50e-6)


def _round_trips(client: BlockingClient, seconds: float) -> tuple[float, float]:
    took = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        client.status()
        took.append((time.perf_counter() - begin) * 1e6)
        # A guest does something between two accesses.
        time.sleep(200e-6)
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100]


BENCHMARK = Benchmark(name="processes", summary="a busy device beside another one, in one process and apart", run=run)
