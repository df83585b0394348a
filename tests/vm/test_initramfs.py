"""Initramfs files in the cache: those that were used last stay."""

import os
import time
from pathlib import Path

from vfiouser_virtio.vm.initramfs import KEPT, forget_old

HOUR = 3600


def make(folder: Path, name: str, hours: float) -> None:
    """A file that was used so many hours ago."""
    (folder / name).touch()
    os.utime(folder / name, times=(0, time.time() - hours * HOUR))


def test_those_used_last_are_kept(tmp_path: Path) -> None:
    for hours in range(2, KEPT + 5):
        make(tmp_path, f"initramfs-6.12-{hours:02}.cpio", hours)
    make(tmp_path, ".initramfs-6.12-02.cpio.half", 3)
    make(tmp_path, ".initramfs-6.12-02.cpio.being-written", 0.1)
    make(tmp_path, "another.cpio", 1000)
    forget_old(tmp_path)
    kept = [f"initramfs-6.12-{hours:02}.cpio" for hours in range(2, KEPT + 2)]
    assert sorted(os.listdir(tmp_path)) == [".initramfs-6.12-02.cpio.being-written", "another.cpio", *kept]


def test_what_may_be_in_use_is_kept(tmp_path: Path) -> None:
    names = [f"initramfs-6.12-{number:02}.cpio" for number in range(2 * KEPT)]
    for name in names:
        make(tmp_path, name, 0.5)
    forget_old(tmp_path)
    assert sorted(os.listdir(tmp_path)) == names
