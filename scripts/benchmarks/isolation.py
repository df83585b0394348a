"""Benchmark of isolation: register round trips of one device while another one is attacked.

Both are served by one process: with ``serve --processes`` there is nothing that they share.
"""

import multiprocessing
import multiprocessing.synchronize
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.isolation_attacks import ATTACKS
from benchmarks.measure import Benchmark, Options, Row, at_most
from benchmarks.server import server
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.raw.blocking import BlockingClient
from vfiouser_virtio.vm.debian import cache_dir

P99_MS, GROWTH_MB = 10.0, 64.0
_WORDS = {"served": "p99, less waits for a CPU"}
_SETUP_S = 120.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of round trips, in ms."""

    p50: float
    p99: float
    served: float
    """The 99th percentile, without the time in which the server or we were ready to run and had no CPU."""
    longest: float


def run(options: Options) -> list[Row]:
    """Attack by attack."""
    options.note("a register's round trips of one device, while another one of the same process is attacked")
    # Not in /tmp, which may be in memory: nothing could be dropped from the page cache.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache_dir()) as folder:
        disk = Path(folder) / "disk"
        disk.write_bytes(os.urandom(64 << 20))
        return [row for name in ATTACKS if re.search(options.only, name) for row in _rows(options, name, disk)]


def _rows(options: Options, name: str, disk: Path) -> list[Row]:
    attack = ATTACKS[name]
    seconds = 0.2 if options.quick else 2.0
    idle: list[_Seen] = []
    attacked: list[_Seen] = []
    growth: list[float] = []
    for number in range(min(options.rounds, 3)):
        options.progress(f"{name}, round {number + 1}")
        with (
            server([attack.device.format(disk=disk), "rng"], *attack.options, stderr=subprocess.DEVNULL) as running,
            BlockingClient(running.paths[1]) as client,
        ):
            client.start()
            idle.append(_round_trips(client, running.process.pid, seconds / 2))
            before = _anonymous_mb(running.process.pid)
            with _attacking(name, running.paths[0], disk):
                attacked.append(_round_trips(client, running.process.pid, seconds))
                growth.append(max(0.0, _anonymous_mb(running.process.pid) - before))
    timed = [
        Row(
            metric=f"{name}: {_WORDS.get(metric, metric)}",
            unit="ms",
            ours=[getattr(each, metric) for each in attacked],
            theirs={"idle": [getattr(each, metric) for each in idle]},
            targets={"": at_most(limit)} if limit else {},
        )
        for metric, limit in (("p50", None), ("p99", P99_MS), ("served", P99_MS), ("longest", None))
    ]
    return [*timed, Row(metric=f"{name}: memory", unit="MB more", ours=growth, targets={"": at_most(GROWTH_MB)})]


@contextmanager
def _attacking(name: str, path: str, disk: Path) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_attack, args=(name, path, disk, begun), daemon=True)
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


def _attack(name: str, path: str, disk: Path, begun: multiprocessing.synchronize.Event) -> None:
    os.nice(5)  # what is to be seen is the server's time, and not whose turn it is on the CPU
    if ATTACKS[name].evicts:
        threading.Thread(target=_evict, args=(disk,), daemon=True).start()
    ATTACKS[name].run(path, begun.set)


def _evict(disk: Path) -> None:
    """Nothing of this file is in the page cache for long."""
    with disk.open("rb+") as file:
        os.fsync(file.fileno())  # what is dirty stays
        while True:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.001)


def _anonymous_mb(pid: int) -> float:
    """Memory of its own, in units of 10^6 bytes: not that of the client, which it maps."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _round_trips(client: BlockingClient, pid: int, seconds: float) -> _Seen:
    took: list[float] = []
    served: list[float] = []
    end = time.perf_counter() + seconds
    waited = _waited_ms(pid)
    while (begin := time.perf_counter()) < end or len(took) < 100:
        client.status()
        took.append((time.perf_counter() - begin) * 1e3)
        before, waited = waited, _waited_ms(pid)
        served.append(max(took[-1] - (waited - before), 0))
        # A guest does something between two accesses.
        time.sleep(200e-6)
        if time.perf_counter() > end + _SETUP_S:
            break
    took.sort()
    served.sort()
    p99 = len(took) * 99 // 100
    return _Seen(took[len(took) // 2], took[p99], served[p99], took[-1])


def _waited_ms(pid: int) -> float:
    """How long a process's main thread and ours have been ready to run and had no CPU, so far.

    (Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.)
    """
    return sum(int(Path(f"/proc/{each}/schedstat").read_text().split()[1]) for each in (pid, os.getpid())) / 1e6


BENCHMARK = Benchmark(name="isolation", summary="a device's registers while its neighbour is attacked", run=run)
