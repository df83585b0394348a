"""``--audit`` of `serve` and `run`: where the report goes, and what exit status it makes."""

import os
import sys
from pathlib import Path
from typing import Self

from vfiouser_virtio.audit import AuditLog
from vfiouser_virtio.audit.report import as_json, as_text
from vfiouser_virtio.cli.exit_status import ExitStatus
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess


class AuditReport:
    """Audit of all devices of a command, and its report, which is written at the end of a block, however that ends.

    ``file`` empty is stderr. Raises ConfigError.
    """

    def __init__(self, file: str) -> None:
        self.log = AuditLog()
        self._file = file
        if file:
            self._write("")  # what cannot be written is said before any guest runs

    @property
    def access(self) -> HostAccess:
        """What the report takes in a sandbox, which is entered before it is written."""
        return HostAccess(writes=(Path(self._file),)) if self._file else NO_ACCESS

    def write(self) -> None:
        """Write the report. Raises ConfigError."""
        if not self._file:
            sys.stderr.write(as_text(self.log))
            return
        self._write(as_json(self.log) if Path(self._file).suffix == ".json" else as_text(self.log))

    def status(self, status: int) -> int:
        """The command's exit status, which is ``status`` without an audit."""
        return ExitStatus.AUDIT if not status and self.log.must_broken else status

    def _write(self, text: str) -> None:
        try:
            # O_NONBLOCK: a FIFO without a reader is an error instead of a server that hangs.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._file, flags, 0o666), "w") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"--audit={self._file}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self.log.devices:  # else no device was served
            self.write()
