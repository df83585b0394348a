"""A disk image for block devices, and both kinds of memory for consoles."""

import os
from functools import partial
from pathlib import Path

import pytest
from support.blk_device import SIZE
from support.console_driver import Run

from vfiouser_virtio.testing.driver import running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=[False, True], ids=["mapped", "messages"])
def run(request: pytest.FixtureRequest) -> Run:
    """`running` with each kind of memory."""
    return partial(running, private=request.param)
