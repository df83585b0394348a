"""``fault-log=FILE``, ``burndown=FILE``: files that get lines of JSON, without a wait for the disk."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.output_file import LimitedLines, open_output
from vfiouser_virtio.serving.line_writer import LineWriter
from vfiouser_virtio.serving.terminal import at_end

# Bytes that wait for a disk; a line of a fault takes some 120.
_ROOM = 4 << 20
BURNDOWN_LIMIT = 64 << 20
"""Bytes of a burndown: a client that connects and leaves in a loop causes a line each time."""


def fault_log(path: Path) -> Callable[[str], None]:
    """What writes lines to the file, which is made anew, for its owner only; `faults.log` limits it.

    Raises DeviceError.
    """
    return _lines(path, "fault-log")


def burndown_log(path: Path) -> Callable[[str], None]:
    """Likewise for what a driver has touched, up to `BURNDOWN_LIMIT`."""
    last = json.dumps({"event": "truncated", "bytes": BURNDOWN_LIMIT})
    return LimitedLines(_lines(path, "burndown"), BURNDOWN_LIMIT, last)


def _lines(path: Path, option: str) -> Callable[[str], None]:
    try:
        fd = open_output(path)
    except OSError as error:
        raise DeviceError(f"{option}={path}: {error.strerror}") from None

    def failed(error: OSError) -> None:
        print(f"vfiouser-virtio: {option}={path} ends: {error.strerror}", file=sys.stderr)

    writer = LineWriter(fd, room=_ROOM, lost=lambda lines: f'{{"event": "lost", "lines": {lines}}}', failed=failed)
    at_end(writer)
    return writer.write
