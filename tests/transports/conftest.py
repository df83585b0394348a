"""A guest at the registers of a virtio-pci function."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from support.pci_guest import Echo, Guest

from vfiouser_virtio.transports import VirtioPci


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(VirtioPci(Echo()))
    yield guest
    guest.function.disconnected()
    os.close(guest.ram)


@pytest.fixture
async def running(guest: Guest, nursery: trio.Nursery) -> Guest:
    nursery.start_soon(guest.function.serve)
    await trio.testing.wait_all_tasks_blocked()
    return guest
