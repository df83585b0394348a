"""Errors that end a server."""

import signal

from vfiouser_virtio.errors import ConfigError


class ProcessError(ConfigError):
    """Unexpected end of one of several device processes."""


class StuckError(ConfigError):
    """Device that did not yield when a signal asked to stop."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.status = 128 + number
