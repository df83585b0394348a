"""Does a hostile client hurt its neighbour? Register round trips of one device while another one is attacked.

Both are served by one process: with ``serve --processes`` there is nothing that they share.
"""

import multiprocessing
import multiprocessing.synchronize
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import Client
from benchmarks.isolation_attacks import ATTACKS
from benchmarks.measure import Benchmark, Options, Row, at_most
from benchmarks.server import server
from vfiouser_virtio.errors import ConfigError

P99_MS, GROWTH_MB = 10.0, 64.0
_SETUP_S = 120.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of round trips, in ms."""

    p50: float
    p99: float
    longest: float


def run(options: Options) -> list[Row]:
    """Attack by attack."""
    chosen = [name for name in ATTACKS if re.search(options.only, name)]
    seconds = 0.2 if options.quick else 2.0
    rounds = min(options.rounds, 3)
    rows: list[Row] = []
    for name in chosen:
        idle: list[_Seen] = []
        attacked: list[_Seen] = []
        growth: list[float] = []
        for number in range(rounds):
            options.progress(f"{name}, round {number + 1}")
            with (
                server([ATTACKS[name].device, "rng"], stderr=subprocess.DEVNULL) as running,
                Client(running.paths[1]) as client,
            ):
                client.start()
                idle.append(_round_trips(client, seconds / 2))
                before = _anonymous_mb(running.process.pid)
                with _attacking(name, running.paths[0]):
                    attacked.append(_round_trips(client, seconds))
                    growth.append(max(0.0, _anonymous_mb(running.process.pid) - before))
        for metric, limit in (("p50", None), ("p99", P99_MS), ("longest", None)):
            rows.append(
                Row(
                    metric=f"{name}: {metric}",
                    unit="ms",
                    ours=[getattr(each, metric) for each in attacked],
                    theirs={"idle": [getattr(each, metric) for each in idle]},
                    targets={"": at_most(limit)} if limit else {},
                )
            )
        rows.append(Row(metric=f"{name}: memory", unit="MB more", ours=growth, targets={"": at_most(GROWTH_MB)}))
    options.note("a register's round trips of one device, while another one of the same process is attacked")
    return rows


@contextmanager
def _attacking(name: str, path: str) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_attack, args=(name, path, begun), daemon=True)
    process.start()
    try:
        end = time.monotonic() + _SETUP_S
        while not begun.wait(0.2):
            if not process.is_alive() or time.monotonic() > end:
                raise ConfigError(f"isolation: the attack {name!r} could not begin")
        yield
        if not process.is_alive():
            raise ConfigError(f"isolation: the attack {name!r} ended by itself")
    finally:
        process.kill()
        process.join()


def _attack(name: str, path: str, begun: multiprocessing.synchronize.Event) -> None:
    os.nice(5)  # what is to be seen is the server's time, and not whose turn it is on the CPU
    ATTACKS[name].run(path, begun.set)


def _anonymous_mb(pid: int) -> float:
    """Memory of its own, in units of 10^6 bytes: not that of the client, which it maps."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _round_trips(client: Client, seconds: float) -> _Seen:
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or len(took) < 100:
        client.status()
        took.append((time.perf_counter() - begin) * 1e3)
        # A guest does something between two accesses.
        time.sleep(200e-6)
        if time.perf_counter() > end + _SETUP_S:
            break
    took.sort()
    return _Seen(took[len(took) // 2], took[len(took) * 99 // 100], took[-1])


BENCHMARK = Benchmark(name="isolation", summary="a device's registers while its neighbour is attacked", run=run)
