"""Benchmark of a slow disk's neighbour: register round trips while requests of two seconds are pending, and without."""

import time

from benchmarks.measure import Benchmark, Options, Row, at_most
from benchmarks.server import served
from vfiouser_virtio.testing.raw.blocking import BlockingClient

PENDING = 80
LIMIT_MS = 10.0


def run(options: Options) -> list[Row]:
    """Measure while idle, then with requests pending, on the same connection."""
    idle: list[tuple[float, float]] = []
    pending: list[tuple[float, float]] = []
    for number in range(1 if options.quick else min(options.rounds, 3)):
        options.progress(f"round {number + 1}")
        with served("blk,size=16M,delay=2s") as (path,), BlockingClient(path) as client:
            client.start()
            idle.append(_round_trips(client, seconds=0.5))
            client.read_sectors(PENDING)
            pending.append(_round_trips(client, seconds=0.2 if options.quick else 1.5))
            assert client.used == 0, "the requests ended before the measurement did"
    options.note(f"a register's round trip while {PENDING} requests of 2 s are pending, and while there is none")
    return [
        Row(metric="median", unit="ms", ours=[p50 for p50, _ in pending], theirs={"idle": [p50 for p50, _ in idle]}),
        Row(
            metric="99th percentile",
            unit="ms",
            ours=[p99 for _, p99 in pending],
            theirs={"idle": [p99 for _, p99 in idle]},
            targets={"": at_most(LIMIT_MS)},
        ),
    ]


def _round_trips(client: BlockingClient, seconds: float) -> tuple[float, float]:
    """The median and the 99th percentile, in ms."""
    took = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        client.status()
        took.append((time.perf_counter() - begin) * 1000)
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100]


BENCHMARK = Benchmark(name="stall", summary="registers while a slow disk has requests pending", run=run)
