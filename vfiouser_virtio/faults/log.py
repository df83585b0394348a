"""Log of faults: JSON lines that say what was done when, and from which the same can be done again.

::

    {"device": "blk0", "seed": 7, "faults": ["used-never:p=0.01"], "time": 1796000000.0}
    {"fault": "used-never", "spec": 0, "queue": 0, "n": 212, "did": "0x5 is not given back", "time": 12.034}
    {"fault": "needs-reset", "spec": 1, "queue": 0, "n": 1, "did": "NEEDS_RESET", "life": 2, "since": 5.0, …}
    {"event": "stopped", "time": 20.0}
    {"event": "started", "name": "used-never", "time": 20.5}

``spec`` is the place in ``faults``, ``n`` the count of what the fault's declaration counts, from 1 on; ``time`` is in
seconds since the first line, for people: nothing of a replay depends on it. Only faults that were due at a time and
have waited for no opportunity have ``life``, the number of the DRIVER_OK before, and ``since``, the seconds since it.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.output_file import LimitedLines

MAX_KEPT = 10_000
"""Entries in memory: a guest that asks for a register a million times a second causes as many."""
MAX_BYTES = 64 << 20
"""Of a file, after which there is a last line, for the same reason."""
MAX_READ = 2 * MAX_BYTES

_LOSSY = {
    "truncated": f"it has ended after {MAX_BYTES >> 20} MiB",
    "lost": "lines are missing, since the disk was slower than the faults",
}
"""Events of a log that does not say all, and why it does not."""


class FaultLog:
    """Log of one device; ``write`` takes each line, with its newline, and must not wait."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self.entries: deque[Mapping[str, Any]] = deque(maxlen=MAX_KEPT)
        """The last ones, without the first line: what each says, but for ``time``."""
        self.faults = 0
        """How many there were, of which `entries` has the last."""
        self.header: Mapping[str, Any] = {}
        """What the first line says."""
        self._write = write and _limited(write)
        self._began = time.monotonic()

    def begin(self, **said: object) -> None:
        """The first line."""
        self.header = said
        self._began = time.monotonic()
        self._put({**said, "time": round(time.time(), 3)})

    def add(self, **said: object) -> None:
        """A line."""
        self.entries.append(said)
        self.faults += "fault" in said
        if self._write is not None:
            self._put({**said, "time": round(time.monotonic() - self._began, 6)})

    def write_to(self, write: Callable[[str], None]) -> None:
        """Write lines from now on, after the first line and what has been logged before."""
        self._write = _limited(write)
        self._put({**self.header, "time": round(time.time(), 3)})
        for entry in self.entries:
            self._put({**entry, "time": round(time.monotonic() - self._began, 6)})

    def text(self) -> str:
        """What it says, a line each."""
        lines = [f"seed {self.header.get('seed')}: {', '.join(self.header.get('faults', ()))}"]
        for entry in self.entries:
            where = "" if entry.get("queue") is None else f" of queue {entry['queue']}"
            event = " ".join(entry[key] for key in ("event", "name") if key in entry)
            lines.append(event or f"{entry['fault']}, n={entry['n']}{where}: {entry['did']}")
        return "\n".join(lines)

    def _put(self, said: Mapping[str, object]) -> None:
        if self._write is not None:
            self._write(json.dumps(said) + "\n")


def _limited(write: Callable[[str], None]) -> LimitedLines:
    return LimitedLines(write, MAX_BYTES, json.dumps({"event": "truncated", "bytes": MAX_BYTES}))


@dataclass(frozen=True, slots=True)
class Recorded:
    """Record of a log: which faults were asked for, with which seed, and where each has happened."""

    seed: int
    faults: tuple[str, ...]
    hits: frozenset[tuple[int, int | None, int]]
    """Place in ``faults``, queue, count."""
    ticks: Mapping[tuple[int, int], Mapping[float, int]]
    """By place in ``faults`` and number of DRIVER_OK: seconds since it, and count, where it happened by itself."""


def _ticks(entries: list[Any]) -> dict[tuple[int, int], dict[float, int]]:
    found: dict[tuple[int, int], dict[float, int]] = {}
    for entry in entries:
        if "since" in entry:
            found.setdefault((entry["spec"], entry["life"]), {})[float(entry["since"])] = entry["n"]
    return found


def read_log(path: str) -> Recorded:
    """What is needed of a log to do the same again. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            read = file.read(MAX_READ + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(read) > MAX_READ:
        raise ConfigError(f"{path}: this is no log of faults: those end after {MAX_BYTES >> 20} MiB")
    try:
        first, *others = [json.loads(line) for line in read.splitlines()]
        events = {entry.get("event") for entry in others}
        for event, why in _LOSSY.items():
            if event in events:
                raise ConfigError(
                    f"{path}: this log of faults cannot be replayed: {why}; use p= or count= to have fewer"
                )
        return Recorded(
            seed=int(first["seed"]),
            faults=tuple(str(fault) for fault in first["faults"]),
            hits=frozenset(
                (entry["spec"], entry["queue"], entry["n"])
                for entry in others
                if "fault" in entry and "since" not in entry
            ),
            ticks=_ticks(others),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ValueError) and "\n" in read and not read.endswith("\n"):
            raise ConfigError(f"{path}: this log of faults ends in the middle of a line: delete that line") from None
        raise ConfigError(f"{path}: this is no log of faults: {error!r}") from None
