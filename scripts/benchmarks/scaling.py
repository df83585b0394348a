"""Benchmark of how a request's cost grows: with the queue's depth, the size, the pieces, the queues, the regions.

The cost is the server's own CPU time, as the wake-ups between two processes say little about it. The device does not
poll here: what it spends while it waits is no cost of a request.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Benchmark, Options, Row, turn
from benchmarks.ring_client import ReadQueue
from benchmarks.server import server
from vfiouser_virtio.testing.raw.blocking import BlockingClient

# Multi-queue (virtio 1.4, 5.2.3), without which a driver has one queue.
_BLK_F_MQ = 1 << 12


@dataclass(frozen=True, slots=True)
class _Case:
    depth: int = 8
    size: int = 4096
    segments: int = 1
    queues: int = 1
    busy: int = 64
    """How many of the queues get requests."""
    regions: int = 1


# Each series begins with what its others are compared with.
SERIES: Sequence[Mapping[str, _Case]] = (
    {f"depth: {depth}": _Case(depth=depth) for depth in (1, 4, 16, 42)},
    {f"size: {size} KiB": _Case(size=size << 10, depth=4) for size in (4, 16, 64, 256)},
    {f"pieces of 64 KiB: {count}": _Case(size=64 << 10, segments=count, depth=4) for count in (1, 4, 16, 30)},
    {f"busy queues: {queues}": _Case(queues=queues) for queues in (1, 4, 16, 64)},
    {f"queues, one busy: {queues}": _Case(queues=queues, busy=1) for queues in (1, 4, 16, 64)},
    {f"mapped regions: {regions}": _Case(regions=regions) for regions in (1, 16, 64, 256)},
)


def run(options: Options) -> list[Row]:
    """All cases of a series in turn."""
    options.note("CPU time of the server for a block read, of 4 KiB and with 8 under way where nothing else is said")
    return [row for series in SERIES for row in _series(options, series)]


def _series(options: Options, series: Mapping[str, _Case]) -> Iterator[Row]:
    names = [*series][:: 3 if options.quick else 1]
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in turn(names, number):
            options.progress(f"{name}, round {number + 1}")
            figures[name].append(_cost(series[name], 0.02 if options.quick else 0.2))
    first = names[0]
    for name, those in figures.items():
        yield Row(metric=name, unit="us", ours=those, theirs={} if name == first else {first: figures[first]})


def _cost(case: _Case, seconds: float) -> float:
    """CPU time per request, in µs."""
    device = f"blk,size=16M,poll=off,num-queues={case.queues}"
    with server([device]) as running, BlockingClient(running.paths[0], regions=case.regions) as client:
        client.negotiate(_BLK_F_MQ if case.queues > 1 else 0)
        queues = [
            ReadQueue(client, index, depth=case.depth, size=case.size, segments=case.segments)
            for index in range(case.queues)
        ]
        client.set("device_status", 15)
        busy = queues[: case.busy]
        _work(busy, seconds)  # what only some devices need is imported with their first requests
        before = running.usage.cpu_s
        requests = _work(busy, seconds) * case.depth
        used = running.usage.cpu_s - before
        return used * 1e6 / requests


def _work(queues: Sequence[ReadQueue], seconds: float) -> int:
    """Keep all queues busy; how many times one was filled."""
    end = time.perf_counter() + seconds
    filled = 0
    for queue in queues:
        queue.submit()
    while time.perf_counter() < end:
        for queue in queues:
            if queue.done:
                queue.submit()
                filled += 1
    while not all(queue.done for queue in queues):
        time.sleep(0)
    return filled + len(queues)


BENCHMARK = Benchmark(
    name="scaling", summary="how a request's cost grows with depth, size, queues and regions", run=run
)
