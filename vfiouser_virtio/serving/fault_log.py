"""``fault-log=FILE``, ``burndown=FILE``: files that get lines of JSON, without a wait for the disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.serving.line_writer import LineWriter
from vfiouser_virtio.serving.terminal import at_end

# Bytes that wait for a disk; a line takes some 120.
_ROOM = 4 << 20


def fault_log(path: Path, option: str = "fault-log") -> Callable[[str], None]:
    """What writes lines to the file, which is made anew. Raises DeviceError."""
    try:
        # O_NONBLOCK: a FIFO without a reader is an error instead of a server that hangs.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeviceError(f"{option}={path}: {error.strerror}") from None
    os.set_blocking(fd, True)

    def failed(error: OSError) -> None:
        print(f"vfiouser-virtio: {option}={path} ends: {error.strerror}", file=sys.stderr)

    writer = LineWriter(fd, room=_ROOM, lost=lambda lines: f'{{"event": "lost", "lines": {lines}}}', failed=failed)
    at_end(writer)
    return writer.write
