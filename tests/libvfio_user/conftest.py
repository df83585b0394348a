"""The real libvfio-user where it is found, its double, which always is, and a client of a server over either."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.connecting import connecting
from support.hosted_echo import HostedEcho
from support.library_client import PAGE, Connect, negotiate
from support.libvfio_user_double import Double
from support.libvfio_user_found import find

from vfiouser_virtio.libvfio_user import LibraryListener, LibvfioUserServer
from vfiouser_virtio.libvfio_user.bindings import HasFunctions, Library
from vfiouser_virtio.testing.raw.client import RawClient


@pytest.fixture(scope="session")
def libvfio_user() -> Library:
    """The real library; the test is left out where there is none."""
    library, reason = find()
    if library is None:
        pytest.skip(reason)
    return library


@pytest.fixture(params=["double", "real"])
def library(request: pytest.FixtureRequest) -> HasFunctions:
    """The double, then the real library."""
    if request.param == "double":
        return Double()
    real: Library = request.getfixturevalue("libvfio_user")
    return real


@pytest.fixture
def device() -> HostedEcho:
    return HostedEcho()


@pytest.fixture
def listener(library: HasFunctions, tmp_path: Path) -> Iterator[LibraryListener]:
    with LibraryListener(tmp_path / "vu.sock") as listener:
        listener.open(library)
        yield listener


@pytest.fixture
def connect(listener: LibraryListener) -> Iterator[Connect]:
    with connecting(listener.name) as connect:
        yield connect


@pytest.fixture
async def client(nursery: trio.Nursery, device: HostedEcho, listener: LibraryListener, connect: Connect) -> RawClient:
    """A client that has negotiated, of a server that runs."""
    nursery.start_soon(LibvfioUserServer(device, name="echo").serve, listener)
    client = connect()
    await negotiate(client)
    return client


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("client")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"the client's memory", 0)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)
