"""Coverage of this package's lines by `sys.monitoring` (PEP 669): each is reported once, and is free after that."""

import os
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from vfiouser_virtio.errors import ConfigError

_OURS = str(Path(__file__).parents[2])
_NOT = str(Path(__file__).parent)  # the fuzzer itself


class LineCoverage:
    """Lines that were run since this was made. Raises ConfigError before Python 3.12.

    ``also`` is a file that counts beside the package's: a device of the user's.
    """

    def __init__(self, also: str = "") -> None:
        # Any: the checkers are told Python 3.11, which has no such module.
        monitoring: Any = getattr(sys, "monitoring", None)
        if monitoring is None:
            raise ConfigError("--corpus: coverage needs Python 3.12 or later (sys.monitoring)")
        self.lines = 0
        self._also = os.path.realpath(also) if also else ""
        self._monitoring = monitoring
        self._tool: int = monitoring.COVERAGE_ID
        try:
            monitoring.use_tool_id(self._tool, "vfiouser-virtio fuzz")
        except ValueError:
            raise ConfigError("--corpus: something else measures coverage in this process") from None
        monitoring.restart_events()
        monitoring.register_callback(self._tool, monitoring.events.LINE, self._line)
        monitoring.set_events(self._tool, monitoring.events.LINE)

    def _line(self, code: CodeType, _line: int) -> object:
        name = code.co_filename
        ours = name.startswith(_OURS) and not name.startswith(_NOT)
        if ours or (self._also and os.path.realpath(name) == self._also):
            self.lines += 1
        return self._monitoring.DISABLE

    def close(self) -> None:
        """Stop looking."""
        self._monitoring.set_events(self._tool, 0)
        self._monitoring.free_tool_id(self._tool)
