"""For all tests."""

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """What lives until the end need not be looked at before each test."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Garbage of earlier tests goes now: collected later, its descriptors would vanish while a test counts its own."""
    gc.collect()
