"""`HangingFiles` for tests: skipped where there is no FUSE."""

from pathlib import Path

import pytest
import trio
from support.command import PATIENCE

from vfiouser_virtio.testing.hanging_files import FuseOp as Op
from vfiouser_virtio.testing.hanging_files import HangingFiles, can_be_mounted

__all__ = ["FuseFiles", "Op"]


class FuseFiles(HangingFiles):
    """As the base class. Skips the test where it cannot be mounted."""

    def __init__(
        self, folder: Path, files: dict[str, bytes], *, direct: bool = True, interruptible: bool = True
    ) -> None:
        if not can_be_mounted():
            pytest.skip("a FUSE file system of our own needs root and /dev/fuse")
        super().__init__(folder, files, direct=direct, interruptible=interruptible)

    async def wait_hanging(self, op: Op) -> None:
        """Return when there is such a request."""
        with trio.fail_after(PATIENCE):
            while not self.held[op]:
                await trio.sleep(0.01)
