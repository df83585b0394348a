"""Where the headers are that the schemas are compared with."""

from pathlib import Path

import pytest
from support.uapi import uapi_include as find_uapi_include


@pytest.fixture
def uapi_include() -> Path:
    """The folder with Linux's UAPI headers; a test that asks for it fails where there is none."""
    return find_uapi_include()
