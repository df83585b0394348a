"""Watch for drivers that poll: the same registers over and over, which never change."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from vfiouser_virtio.pci.accesses import STEP, Accesses

MOST_POLLED = 4
"""Registers that one loop of a driver polls: more of them are work."""


@dataclass(frozen=True, slots=True)
class Spin:
    """Driver that polls and gets nowhere."""

    polled: tuple[tuple[str, int], ...]
    """Names of registers, and what each reads as all the time."""
    reads: int
    seconds: float

    def __str__(self) -> str:
        """``status (0x0): 5000 reads in 0.5 s``."""
        names = ", ".join(f"{name} ({value:#x})" for name, value in self.polled)
        return f"{names}: {self.reads} reads in {self.seconds:.1f} s"


class SpinWatch:
    """Looks at what was accessed since the last look; ``threshold`` is the number of reads without a change."""

    def __init__(self, accesses: Accesses, threshold: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._accesses, self._threshold, self._clock = accesses, threshold, clock
        self._parts = accesses.parts
        self._read = [part.reads for part in self._parts]
        self._written = [part.writes for part in self._parts]
        self._unmodelled: dict[tuple[int, int, int, bool], int] = {}
        self._count, self._resets = accesses.count, accesses.resets
        self._polled: tuple[tuple[str, int], ...] = ()
        self._reads = 0
        self._since = self._looked = clock()
        self._told = False
        self.spin: Spin | None = None
        """What the last look has found."""
        self.idle = False
        """Whether there was no access between the last two looks."""

    def begin(self) -> None:
        """Accesses begin after a time without any, which is no part of a spin."""
        self._looked = self._clock()

    def look(self) -> Spin | None:
        """The spin, once it has had ``threshold`` reads: once for each."""
        for _ in self.steps():
            pass
        return self.spin

    def steps(self) -> Iterator[None]:
        """As `look`, with `spin` at the end; between the steps others may have their turns."""
        self.spin = None
        count = self._accesses.count
        now = self._clock()
        begun, self._looked = self._looked, now
        self.idle = count == self._count
        if self.idle:
            return
        self._count = count
        polled = yield from self._reads_since()
        if self._resets != self._accesses.resets:
            self._resets, polled = self._accesses.resets, None
        if polled is None or not 0 < len(polled) <= MOST_POLLED:
            self._polled, self._reads, self._since, self._told = (), 0, begun, False
            return
        seen = tuple((name, value) for name, value, _ in polled)
        if seen != self._polled:
            self._polled, self._reads, self._since, self._told = seen, 0, begun, False
        self._reads += sum(reads for _, _, reads in polled)
        if self._told or self._reads < self._threshold:
            return
        self._told = True
        self.spin = Spin(seen, self._reads, now - self._since)

    def _reads_since(self) -> Generator[None, None, list[tuple[str, int, int]] | None]:
        """Name, value and number of reads of what was read since the last look; None where more than that happened."""
        found: list[tuple[str, int, int]] | None = []
        read, written = self._read, self._written
        for start in range(0, len(self._parts), STEP):
            if start:
                yield
            for number, part in enumerate(self._parts[start : start + STEP], start):
                if part.reads == read[number] and part.writes == written[number]:
                    continue
                times, value = part.reads - read[number], part.polled
                if part.writes != written[number] or value is None:
                    found = None
                elif found is not None:
                    found.append((part.name, value, times))
                read[number], written[number] = part.reads, part.writes
        for key, each in self._accesses.unmodelled.items():
            times = each.times - self._unmodelled.get(key, 0)
            if times:
                self._unmodelled[key] = each.times
                if each.write:
                    found = None
                elif found is not None:
                    found.append((f"BAR{each.bar}+{each.offset:#x}", each.value, times))
        return found
