"""``fault-log=FILE``, ``burndown=FILE``: files that get lines of JSON, without a wait for the disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.output_file import open_output
from vfiouser_virtio.serving.line_writer import LineWriter
from vfiouser_virtio.serving.terminal import at_end

# Bytes that wait for a disk; a line takes some 120.
_ROOM = 4 << 20


def fault_log(path: Path, option: str = "fault-log") -> Callable[[str], None]:
    """What writes lines to the file, which is made anew, for its owner only. Raises DeviceError."""
    try:
        fd = open_output(path)
    except OSError as error:
        raise DeviceError(f"{option}={path}: {error.strerror}") from None
    os.set_blocking(fd, True)

    def failed(error: OSError) -> None:
        print(f"vfiouser-virtio: {option}={path} ends: {error.strerror}", file=sys.stderr)

    writer = LineWriter(fd, room=_ROOM, lost=lambda lines: f'{{"event": "lost", "lines": {lines}}}', failed=failed)
    at_end(writer)
    return writer.write
