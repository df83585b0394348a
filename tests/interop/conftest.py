"""The real QEMU and the small Linux guest, fetched and built once."""

from collections.abc import Iterator

import pytest
from support.engines import use_engine
from support.libvfio_user_found import find

from vfiouser_virtio import vm
from vfiouser_virtio.engines import ENGINES, EngineName


@pytest.fixture(scope="session")
def qemu() -> vm.Qemu:
    return vm.find_qemu()


@pytest.fixture(scope="session")
def guest_image() -> vm.GuestImage:
    return vm.guest_image()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[EngineName]:
    """The test's devices are served by one engine after the other; left out where there is no libvfio-user."""
    name: EngineName = request.param
    if name == "libvfio-user":
        library, reason = find()
        if library is None:
            pytest.skip(reason)
    with use_engine(name):
        yield name
