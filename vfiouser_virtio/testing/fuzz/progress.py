"""Progress of a fuzzing run on stderr: one line that changes on a terminal, else a line every ten seconds."""

import sys
import time

from vfiouser_virtio.testing.fuzz.report import FuzzReport

_ON_A_TERMINAL, _ELSEWHERE = 0.2, 10.0  # seconds between two


class ProgressLine:
    """Progress line; `tick` may be called for every case."""

    def __init__(self, report: FuzzReport) -> None:
        self._report = report
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (_ON_A_TERMINAL if self._terminal else _ELSEWHERE)
        self._shown = False

    def tick(self) -> None:
        """Say it, if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_ON_A_TERMINAL if self._terminal else _ELSEWHERE)
        self._shown = True
        text = f"{self._report.seconds:.0f} s: {self._report.line()}"
        print(f"\r\033[K{text}" if self._terminal else text, file=sys.stderr, end="" if self._terminal else "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for another line."""
        if self._terminal and self._shown:
            print("\r\033[K", file=sys.stderr, end="", flush=True)
        self._shown = False
