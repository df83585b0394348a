"""Growth of a server's processes: private memory, descriptors, mappings, at moments of a long run.

Clients come and go, so what counts is the least of a window of time: what stays when nothing is under way.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiouser_virtio.testing.soak.children import children_of

_WARM_UP, _WINDOW = 0.2, 0.2
"""Parts of the run: one that does not count, then the first window; the other window is at the end."""
_LEAST = 20
"""Samples of a window, below which nothing can be said."""
_FDS, _MAPPINGS = 2, 24
"""Growth of each process that is none: descriptors that are opened once; the allocator's arenas come and go."""
_MEMORY = 4 << 20


@dataclass(frozen=True)
class HeldSample:
    """Amounts of a server and its children, all together."""

    memory: int
    """Bytes of private memory that is there (RssAnon: guests' memory, which is shared, does not count)."""
    fds: int
    mappings: int
    processes: int


def held_by(pid: int) -> HeldSample | None:
    """What they hold now; None where one of them is just ending."""
    memory = fds = mappings = 0
    family = [pid, *children_of(pid)]
    for each in family:
        folder = Path("/proc", str(each))
        try:
            status = (folder / "status").read_text()
            memory += 1024 * int(status.partition("RssAnon:")[2].split()[0])
            fds += len(os.listdir(folder / "fd"))
            mappings += (folder / "maps").read_bytes().count(b"\n")
        except (OSError, IndexError):
            return None
    return HeldSample(memory, fds, mappings, len(family))


def _least(samples: Sequence[HeldSample]) -> HeldSample:
    return HeldSample(*(min(getattr(each, name) for each in samples) for name in HeldSample.__dataclass_fields__))


@dataclass(frozen=True)
class Growth:
    """First and last window of a run."""

    first: HeldSample
    last: HeldSample

    @staticmethod
    def of(samples: Sequence[HeldSample]) -> "Growth | None":
        """None where the run was too short for a verdict."""
        count, begin = int(len(samples) * _WINDOW), int(len(samples) * _WARM_UP)
        if count < _LEAST:
            return None
        return Growth(_least(samples[begin : begin + count]), _least(samples[-count:]))

    def complaints(self) -> list[str]:
        """What has grown, with how much."""
        each = self.first.processes
        allowed = {"memory": _MEMORY * each, "fds": _FDS * each, "mappings": _MAPPINGS * each, "processes": 0}
        return [
            f"{name} grew from {before} to {after}"
            for name, room in allowed.items()
            if (after := getattr(self.last, name)) > (before := getattr(self.first, name)) + room
        ]
