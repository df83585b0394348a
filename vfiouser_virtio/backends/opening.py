"""Opening of a disk as a device's options say it: a file, a block device of the host, or RAM.

A disk in RAM does without the module for files, and so without those for io_uring and threads.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vfiouser_virtio.backends.block import Aio, BlockBackend, Cache
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.errors import DeviceError

if TYPE_CHECKING:
    from vfiouser_virtio.backends.file import FileBackend


def open_disk(
    device: str,
    path: Path | None,
    size: int | None,
    readonly: bool,
    aio: Aio,
    cache: Cache,
    backend: BlockBackend | None = None,
) -> BlockBackend:
    """The disk, for an error message of ``device``; ``backend`` is returned as it is.

    Raises DeviceError unless exactly one of ``path``, ``size`` and ``backend`` is there, and as `FileBackend` does.
    """
    if sum(source is not None for source in (path, size, backend)) != 1:
        raise DeviceError(f"{device} needs path=FILE or size=SIZE (a disk in RAM), and only one of them")
    if backend is not None:
        return backend
    if path is not None:
        from vfiouser_virtio.backends.file import FileBackend  # only here: see the module

        return FileBackend(path, readonly=readonly, aio=aio, direct=cache == "none")
    if cache == "none":
        raise DeviceError("cache=none is for path=FILE: a disk in RAM has no cache")
    assert size is not None
    return RamBackend(size, readonly=readonly)


def in_file(backend: BlockBackend) -> "FileBackend | None":
    """The backend, if it is one in a file or on a block device of the host."""
    if isinstance(backend, RamBackend):
        return None
    from vfiouser_virtio.backends.file import FileBackend  # only here: see the module

    return backend if isinstance(backend, FileBackend) else None


def check_blocks(backend: BlockBackend, block: int) -> None:
    """Raise DeviceError for a disk that has no whole number of blocks, or whose host needs larger ones (O_DIRECT)."""
    check_disk_size(backend.size, block)
    file = in_file(backend)
    if file is not None and file.alignment > block:
        raise DeviceError(
            f"cache=none needs blocks of {file.alignment} bytes with {file.path}: logical-block-size={file.alignment}"
        )


def check_disk_size(size: int, block: int) -> None:
    """Raise DeviceError for a size that is no multiple of a disk's blocks."""
    if size <= 0 or size % block:
        fitting = max(-(-size // block), 1) * block
        raise DeviceError(
            f"{size} bytes is no multiple of the disk's {block}-byte blocks: truncate -s {fitting} makes it one"
        )


def check_power_of_two(option: str, value: int, low: int, high: int) -> None:
    """Raise DeviceError for an option that is none."""
    if not low <= value <= high or value & (value - 1):
        raise DeviceError(f"{option} is {value}, not a power of two from {low} to {high}")
