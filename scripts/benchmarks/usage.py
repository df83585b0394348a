"""Usage of a process and its children: CPU time, memory, wake-ups (Linux, proc(5))."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What a look at a thread raises that has ended since it was listed.
_ENDED = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Usage:
    """Figures of a process and all that it has started, read anew at each access."""

    pid: int

    @property
    def cpu_s(self) -> float:
        """CPU time so far, of threads that have ended too, in user and kernel mode."""
        # The clock id that clock_getcpuclockid(3) gives: Linux, include/linux/posix-timers_types.h, CPUCLOCK_SCHED.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._pids())

    @property
    def memory_mb(self) -> float:
        """Resident memory, in units of 10^6 bytes; what processes share counts in each of them."""
        return sum(_status(f"/proc/{pid}", "VmRSS") for pid in self._pids()) * 1024 / 1e6

    @property
    def switches(self) -> int:
        """How often its threads have been given a CPU: each is a wake-up, or a time slice that ended."""
        switches = 0
        for pid in self._pids():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(*_ENDED):
                    switches += _status(str(thread), "voluntary_ctxt_switches")
                    switches += _status(str(thread), "nonvoluntary_ctxt_switches")
        return switches

    def _pids(self) -> Iterator[int]:
        waiting = [self.pid]
        while waiting:
            yield (pid := waiting.pop())
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(*_ENDED):
                    waiting += map(int, (thread / "children").read_text().split())


def _status(folder: str, key: str) -> int:
    with open(f"{folder}/status") as status:
        for line in status:
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    raise KeyError(key)
