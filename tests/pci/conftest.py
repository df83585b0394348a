"""A function with one of everything, and real eventfds."""

from collections.abc import Iterator

import pytest
from support.pci import EventFds, Machine


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
