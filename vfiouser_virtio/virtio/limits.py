"""Rate limits of a device: requests and bytes for each second, as token buckets.

::

              rate × time
                   │            a request is taken while every bucket has a token; what it costs beyond what is
                   ▼            there is owed, and nothing more is taken until that is paid off
    burst ─ ─ ─┌───────┐
               │ level │──▶ one for each request, one for each byte of its buffers
          0 ─ ─└───────┘
"""

from dataclasses import dataclass
from typing import Annotated

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.virtio.options import Size

SHORTEST = 0.01
"""Seconds of its rate that every burst has room for: a timer is late by a millisecond or two, and that is not lost."""
_DEFAULT = 0.1
"""Seconds of its rate that a burst has by default, as with QEMU's throttling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one device, all of its queues together. Raises ConfigError for what cannot be."""

    iops: Annotated[
        int | None, "requests (packets of a network) that the device takes in a second at most; default: no limit"
    ] = None
    bps: Annotated[Size | None, "bytes of their buffers that it takes in a second at most; default: no limit"] = None
    iops_burst: Annotated[
        int | None,
        "requests that it takes at once after a rest; default: those of 0.1 s; at least those of 0.01 s",
    ] = None
    bps_burst: Annotated[Size | None, "bytes that it takes at once after a rest; default and least as iops-burst"] = (
        None
    )

    def __post_init__(self) -> None:
        for name, rate, burst in (("iops", self.iops, self.iops_burst), ("bps", self.bps, self.bps_burst)):
            if rate is not None and rate < 1:
                raise ConfigError(f"{name}={rate}: expected 1 or more; without {name} there is no limit")
            if burst is None:
                continue
            if rate is None:
                raise ConfigError(f"{name}-burst={burst} goes with {name}, and there is none")
            if burst < 1:
                raise ConfigError(f"{name}-burst={burst}: expected 1 or more")

    def __bool__(self) -> bool:
        return self.iops is not None or self.bps is not None

    def buckets(self, now: float) -> "tuple[Bucket, Bucket]":
        """That of requests and that of bytes, both full."""
        return Bucket(self.iops, self.iops_burst, now), Bucket(self.bps, self.bps_burst, now)


class Bucket:
    """Token bucket: up to ``burst`` tokens, ``rate`` of them in a second; without a rate it is never empty.

    Times are those of one clock, in seconds.
    """

    __slots__ = ("_at", "_rate", "burst", "level")

    def __init__(self, rate: int | None, burst: int | None, now: float) -> None:
        self._rate = rate
        self._at = now
        self.burst = 0.0 if rate is None else max(rate * _DEFAULT if burst is None else burst, rate * SHORTEST, 1.0)
        """How many there are at most."""
        self.level = self.burst
        """How many there were when it was last looked at; below zero: how many are owed."""

    def spend(self, tokens: float, now: float) -> None:
        """Take tokens, whether they are there or not; fewer than none are given back."""
        if self._rate is not None:
            self._fill(now)
            self.level = min(self.level - tokens, self.burst)

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 where there is one."""
        if self._rate is None:
            return 0.0
        self._fill(now)
        return max(1.0 - self.level, 0.0) / self._rate

    def available(self, now: float) -> float:
        """How many tokens are there: infinity without a rate."""
        if self._rate is None:
            return float("inf")
        self._fill(now)
        return self.level

    def _fill(self, now: float) -> None:
        assert self._rate is not None
        self.level = min(self.level + (now - self._at) * self._rate, self.burst)
        self._at = now
