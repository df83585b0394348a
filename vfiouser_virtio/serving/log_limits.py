"""Rate limit of log lines: a token bucket for each device, whatever its guest and clients do.

The bucket is the device's, known by its id, so that it survives resets, and clients that come and go. What is dropped
is counted, and said when there are tokens again: a flood becomes ``rate`` lines a second, and a number.
"""

import time
from collections.abc import Callable, Iterator

BURST = 10
"""Seconds' worth of lines that may come at once: a driver that starts says much, and then is silent."""


class _Bucket:
    __slots__ = ("dropped", "filled", "since", "tokens")

    def __init__(self, tokens: float, filled: float) -> None:
        self.tokens = tokens
        self.filled = filled
        """When ``tokens`` was right."""
        self.dropped = 0
        self.since = 0.0
        """When the first of ``dropped`` was."""


class LogLimits:
    """Limit of ``rate`` lines a second for each device; 0 for no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def admits(self, device: str) -> bool:
        """Whether a line may be written now; otherwise it is counted. `charge` is due afterwards, `owed` before."""
        if not self.rate:
            return True
        now = self._clock()
        bucket = self._fill(device, now)
        # Once it is empty, a second's worth is saved up: or else each line would come with a report of one dropped.
        if bucket.tokens >= (max(self.rate, 1) if bucket.dropped else 1):
            return True
        if not bucket.dropped:
            bucket.since = now
        bucket.dropped += 1
        return False

    def charge(self, device: str, lines: int) -> None:
        """So many were written. A traceback may take more than there is: the device's next lines pay for it."""
        if self.rate:
            self._buckets[device].tokens -= lines

    def owed(self, device: str) -> str | None:
        """The line that says what of the device was dropped, if something was and there are tokens again."""
        bucket = self._buckets.get(device)
        if bucket is None or not bucket.dropped:
            return None
        now = self._clock()
        if self._fill(device, now).tokens < max(self.rate, 1):
            return None
        return self._report(device, bucket, now)

    def all_owed(self, *, final: bool = False) -> Iterator[str]:
        """What `owed` says of each device; with ``final`` also where there are no tokens: no other time will come."""
        for device, bucket in tuple(self._buckets.items()):
            if final and bucket.dropped:
                yield self._report(device, bucket, self._clock())
            elif line := self.owed(device):
                yield line

    def next_report(self) -> float | None:
        """Seconds until something is `owed`; None when nothing was dropped."""
        short = [max(self.rate, 1) - each.tokens for each in self._buckets.values() if each.dropped]
        return max(min(short) / self.rate, 0.05) if short else None

    def _fill(self, device: str, now: float) -> _Bucket:
        full = max(self.rate * BURST, 1)
        bucket = self._buckets.get(device)
        if bucket is None:
            bucket = self._buckets[device] = _Bucket(full, now)
        bucket.tokens = min(full, bucket.tokens + (now - bucket.filled) * self.rate)
        bucket.filled = now
        return bucket

    @staticmethod
    def _report(device: str, bucket: _Bucket, now: float) -> str:
        dropped, bucket.dropped = bucket.dropped, 0
        return f"{device}: {dropped} more lines were dropped in the last {now - bucket.since:.1f} s (see --log-rate)"
