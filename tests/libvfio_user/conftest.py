"""The real libvfio-user where it is found, and its double, which always is."""

import pytest
from support.libvfio_user_double import Double
from support.libvfio_user_found import find

from vfiouser_virtio.libvfio_user.bindings import HasFunctions, Library


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
