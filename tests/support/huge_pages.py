"""Huge pages of 2 MiB for a test, where it may have some: reserved before it, and given back after it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have so many free ones, or skip the test; after it, all of them must be free again."""
    try:
        lock = os.open(_POOL, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        pytest.skip("this kernel has no huge pages of 2 MiB")
    try:
        # Tests run in several processes, and the pool is the machine's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int((_POOL / "nr_hugepages").read_text())
        missing = max(count - free(), 0)
        if missing and not os.access(_POOL / "nr_hugepages", os.W_OK):
            pytest.skip(f"{count} free huge pages of 2 MiB are needed; only root may reserve them (vm.nr_hugepages)")
        try:
            if missing:
                (_POOL / "nr_hugepages").write_text(str(before + missing))
            if free() < count:
                pytest.skip(f"{count} free huge pages of 2 MiB are needed; the kernel found room for {free()}")
            spare = free()
            yield
            assert free() == spare, "huge pages are still in use"
        finally:
            if missing:
                (_POOL / "nr_hugepages").write_text(str(before))
    finally:
        os.close(lock)


def free() -> int:
    """How many are free, and not promised to anybody."""
    return int((_POOL / "free_hugepages").read_text()) - int((_POOL / "resv_hugepages").read_text())
