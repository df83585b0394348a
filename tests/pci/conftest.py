"""A function with one of everything, and real eventfds."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.fake_simulator import Card
from support.pci import EventFds, Machine
from support.pci_chip import Chip, Driven

from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.guest.function import GuestFunction
from vfiouser_virtio.testing.own_pci import pci_function


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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a bridge's socket."""
    return tmp_path / "sim.sock"


@pytest.fixture
async def card(path: Path) -> AsyncIterator[GuestFunction]:
    """A bridge, whose simulator may connect to `path`."""
    async with pci_function(Card(simulator=path)) as function:
        yield function
