"""Fixtures of the tests that have network namespaces of their own."""

from collections.abc import Iterator

import pytest
from support.net_namespace import NetNamespace, net_namespace


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    with net_namespace() as made:
        yield made
