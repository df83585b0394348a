"""A function with one of everything, and real eventfds."""

import os
from collections.abc import Iterator

import pytest
from support.pci import EventFds, Machine
from support.pci_chip import Chip, Driven

from vfiouser_virtio.eventfds import signal


@pytest.fixture(scope="session", autouse=True)
def _what_signalling_needs() -> None:
    """Opened for the first signal: else it would take a number that a test has just seen closed."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    signal(fd)
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[EventFds]:
    made = EventFds()
    yield made
    made.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.function.disconnected()


@pytest.fixture
def chip() -> Chip:
    return Chip()


@pytest.fixture
def driver(chip: Chip) -> Driven:
    return Driven(chip)
