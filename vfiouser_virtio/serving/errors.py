"""Errors that end a server."""

import signal

from vfiouser_virtio.errors import ConfigError


class ProcessError(ConfigError):
    """Unexpected end of one of several device processes."""


class StuckError(ConfigError):
    """It was time to end, mostly as a signal had asked for it, and a device did not yield or come to its end."""

    def __init__(self, message: str, number: signal.Signals | None = None) -> None:
        super().__init__(message)
        self.status = 1 if number is None else 128 + number
