"""Errors that end a server."""

import signal

from vfiouser_virtio.errors import ConfigError


class ProcessError(ConfigError):
    """With a process for each device, one of them has ended in a way that it should not."""


class StuckError(ConfigError):
    """A signal asked to stop, and a device did not yield."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.status = 128 + number
