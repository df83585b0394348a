"""inotify: a change ends the wait, however it was made; without one nothing happens."""

import os
from pathlib import Path

import pytest
import trio

from vfiouser_virtio.backends.block import BlockBackend
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.file_changes import FileChanges
from vfiouser_virtio.backends.ram import RamBackend


async def test_truncating_and_writing_are_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        changes = FileChanges(file.fileno())
        try:
            path.rename(tmp_path / "elsewhere")  # it is the open file that counts
            os.truncate(tmp_path / "elsewhere", 8192)
            with trio.fail_after(60):
                await changes.wait()
            os.pwrite(fd := os.open(tmp_path / "elsewhere", os.O_WRONLY), b"x", 0)
            os.close(fd)
            with trio.fail_after(60):
                await changes.wait()
        finally:
            changes.close()


async def test_reading_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        changes = FileChanges(file.fileno())
        try:
            path.read_bytes()
            with trio.move_on_after(0.05) as scope:
                await changes.wait()
            assert scope.cancelled_caught
        finally:
            changes.close()


@pytest.mark.parametrize("medium", ["file", "ram"])
async def test_an_idle_disk_is_waited_for_without_a_timer(tmp_path: Path, medium: str) -> None:
    backend: BlockBackend
    if medium == "file":
        path = tmp_path / "disk"
        path.write_bytes(bytes(4096))
        backend = FileBackend(path)
    else:
        backend = RamBackend(4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.wait_size_changed)
        await trio.testing.wait_all_tasks_blocked()
        # No deadline: nothing but a change will wake this process.
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
        nursery.cancel_scope.cancel()
    backend.close()
