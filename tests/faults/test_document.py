"""docs/evil.md has the tables that the declarations make."""

from pathlib import Path

import pytest

from vfiouser_virtio.faults.document import tables

pytestmark = pytest.mark.once


def test_the_tables_are_those_of_the_declarations() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "evil.md").read_text()
    assert text.endswith("\n" + tables()), "python -m vfiouser_virtio.faults prints them"
