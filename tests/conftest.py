"""For all tests."""

import gc

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, however long a busy machine takes for one.
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is too long for every run."""
    parser.addoption(
        "--long", action="store_true", help="full amounts where tests move data or count operations: 1 GiB, not 16 MiB"
    )


@pytest.fixture(scope="session")
def long_run(request: pytest.FixtureRequest) -> bool:
    """Whether full amounts are wanted (``--long``), not those that a run of the whole suite has time for."""
    return bool(request.config.getoption("--long"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What lives until the end need not be looked at before each test."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Garbage of earlier tests goes now: collected later, its descriptors would vanish while a test counts its own."""
    gc.collect()
