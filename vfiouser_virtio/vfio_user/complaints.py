"""Log lines that a hostile or merely chatty peer cannot multiply: each kind once, and their number at the end."""

import logging
from collections import Counter
from collections.abc import Hashable


class Complaints:
    """What has been logged about one connection, by kind."""

    def __init__(self, logger: logging.Logger, name: str) -> None:
        self._logger = logger
        self._name = name
        self._counts: Counter[tuple[int, Hashable]] = Counter()

    def log(self, kind: Hashable, text: str, level: int = logging.WARNING, error: BaseException | None = None) -> None:
        """Log ``text`` if it is the first of its kind, with the traceback of ``error`` if there is one."""
        self._counts[level, kind] += 1
        if self._counts[level, kind] == 1:
            self._logger.log(level, "%s: %s", self._name, text, exc_info=error)

    def summarize(self) -> None:
        """Say how many warnings and errors were not written."""
        silent = sum(count - 1 for (level, _kind), count in self._counts.items() if level >= logging.WARNING)
        if silent:
            self._logger.warning("%s: %d more complaints like these", self._name, silent)
