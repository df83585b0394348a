"""Does a slow disk stall the server? Register round trips while requests of two seconds are pending, and without."""

import time
from dataclasses import dataclass

from benchmarks.client import Client, served

PENDING = 80
LIMIT_MS = 10.0


@dataclass(frozen=True)
class Report:
    """Milliseconds."""

    idle_p50: float
    idle_p99: float
    pending_p50: float
    pending_p99: float
    round_trips: int
    pending_requests: int

    @property
    def met(self) -> bool:
        """Whether the limit is kept, and was measured while requests were pending."""
        return self.pending_p99 < LIMIT_MS

    def __str__(self) -> str:
        return (
            f"register round trip p50 {self.pending_p50:.3f} ms, p99 {self.pending_p99:.3f} ms (limit {LIMIT_MS:g} ms) "
            f"with {self.pending_requests} requests of 2 s pending; idle p50 {self.idle_p50:.3f}, "
            f"p99 {self.idle_p99:.3f} ms; ratio of p50s {self.pending_p50 / self.idle_p50:.2f}; "
            f"{self.round_trips} round trips"
        )


def run() -> Report:
    """Measure once idle, once with requests pending."""
    with served("blk,size=16M,delay=2s") as (path,), Client(path) as client:
        client.start()
        idle = _round_trips(client, seconds=1.0)
        client.read_sectors(PENDING)
        pending = _round_trips(client, seconds=1.5)
        assert client.used == 0, "the requests ended before the measurement did"
    return Report(*_percentiles(idle), *_percentiles(pending), len(pending), PENDING)


def _round_trips(client: Client, seconds: float) -> list[float]:
    took = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        client.status()
        took.append((time.perf_counter() - begin) * 1000)
    return sorted(took)


def _percentiles(took: list[float]) -> tuple[float, float]:
    return took[len(took) // 2], took[len(took) * 99 // 100]
