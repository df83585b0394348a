"""``--audit`` of `serve` and `run`: where the report goes, and what exit status it makes."""

import os
import sys
from pathlib import Path
from typing import Self

from vfiouser_virtio.audit import AuditLog
from vfiouser_virtio.audit.report import as_json, as_text
from vfiouser_virtio.cli.exit_status import ExitStatus
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.output_file import open_output, write_all

# For a reader that does not read: the server ends in any case.
_PATIENCE_MS = 5000


class AuditReport:
    """Audit of all devices of a command, and its report, which is written at the end of a block, however that ends.

    ``file`` empty is stderr. Raises ConfigError.
    """

    def __init__(self, file: str) -> None:
        self.log = AuditLog()
        self._file = file
        self._fd: int | None = None
        if file:
            try:  # now: what cannot be written is said before any guest runs, and in a sandbox nothing is opened
                self._fd = open_output(file, mode=0o666)
            except OSError as error:
                raise self._mistake(error) from None

    def write(self) -> None:
        """Write the report. Raises ConfigError."""
        if self._fd is None:
            sys.stderr.write(as_text(self.log))
            return
        text = as_json(self.log) if Path(self._file).suffix == ".json" else as_text(self.log)
        try:
            write_all(self._fd, text.encode(errors="backslashreplace"), patience_ms=_PATIENCE_MS)
        except OSError as error:
            raise self._mistake(error) from None

    def status(self, status: int) -> int:
        """The command's exit status, which is ``status`` without an audit."""
        return ExitStatus.AUDIT if not status and self.log.must_broken else status

    def _mistake(self, error: OSError) -> ConfigError:
        return ConfigError(f"--audit={self._file}: {error.strerror}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self.log.devices:  # else no device was served
            self.write()
        if self._fd is not None:
            os.close(self._fd)
