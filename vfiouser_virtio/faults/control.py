"""Control of faults while they run: a FIFO (fifo(7)) that takes lines, for ``echo stop >faults.ctl``.

==================  ============================================
``stop``            no fault happens until ``start``
``start``           they happen again
``stop NAME``       the same for the faults of this name
``start NAME``
``status``          how often each has happened
==================  ============================================

Each line is answered by one in the log.
"""

import logging
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vfiouser_virtio.device_log import DeviceLog, quoted
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.faults.plan import FaultPlan

MAX_LINE = 200
"""Bytes of a line: what writes without a newline gets no more of our memory."""
_AT_ONCE = 4096
"""Bytes of one read, after which all other tasks have their turn."""

logger = logging.getLogger(__name__)


class FaultControl:
    """FIFO of one device's faults: ``path``, which has to be there. Raises DeviceError."""

    def __init__(self, path: Path, faults: FaultPlan, device: str) -> None:
        self._faults = faults
        self._log = DeviceLog(logger, device)
        try:
            # For writing as well: so there is no end of file when a writer leaves, and no writer waits for us to open.
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"fault-control={path}: {error.strerror}: make it with mkfifo(1) first") from None
        self._file = open(fd, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            self.close()
            raise DeviceError(f"fault-control={path} is no FIFO: make one with mkfifo(1)")

    def close(self) -> None:
        """Let go of the FIFO, whose file stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def serve(self) -> None:
        """Do what lines say, until cancelled."""
        begun = b""
        while True:
            await trio.lowlevel.wait_readable(self._file)
            data = self._file.read(_AT_ONCE)
            if not data:
                continue
            *lines, begun = (begun + data).split(b"\n")
            for line in lines:
                self._do(line)
            begun = begun[: MAX_LINE + 1]  # enough to see that it is too long

    def _do(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        match text.split() if len(line) <= MAX_LINE else [text]:
            case []:
                pass
            case ["status"]:
                self._log.info("%s", self._faults.status())
            case ["stop" | "start" as what, *names] if len(names) <= 1:
                try:
                    (self._faults.stop if what == "stop" else self._faults.start)(*names)
                except ConfigError as error:
                    self._log.warning("fault-control: %s", error)
                else:
                    self._log.info("fault-control: %s: %s", text, self._faults.status())
            case _:
                self._log.warning(
                    "fault-control: %s: expected stop, start, stop NAME, start NAME, status", quoted(text)
                )
