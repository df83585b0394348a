"""A disk image for block devices."""

import os
from pathlib import Path

import pytest
from support.blk_device import SIZE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path
