"""Errors that end a server, and the user's mistake in what a nursery has raised."""

import signal
from collections.abc import Iterator

from vfiouser_virtio.errors import ConfigError


class ProcessError(ConfigError):
    """With a process for each device, one of them has ended in a way that it should not."""


class StuckError(ConfigError):
    """A signal asked to stop, and a device did not yield."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.status = 128 + number


def mistake_in(error: Exception) -> ConfigError | None:
    """The user's mistake in what a nursery has raised; None when anything else is in it, which is a bug."""
    leaves = list(_leaves(error))
    mistakes = [leaf for leaf in leaves if isinstance(leaf, ConfigError)]
    return mistakes[0] if len(mistakes) == len(leaves) else None


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
