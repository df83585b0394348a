"""A disk with a hole in it: reads of some sectors fail with VIRTIO_BLK_S_IOERR, all else works.

vfiouser-virtio run --device examples/failing_disk.py:FailingDisk,size=16M,first=8,count=8 \
    --exec 'dd if=/dev/vda of=/dev/null bs=4k; dmesg | tail -n 3'
"""

import errno
from typing import Annotated

from vfiouser_virtio import Size, main
from vfiouser_virtio.backends.block import Segments
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE

DEFAULT_SIZE = Size(16 << 20)


class Scratched(RamBackend):
    """A RAM disk on which ``bad``, a range of bytes, cannot be read."""

    def __init__(self, size: int, bad: range) -> None:
        super().__init__(size)
        self.bad = bad

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        end = offset + sum(map(len, segments))
        if offset < self.bad.stop and self.bad.start < end:
            raise OSError(errno.EIO, f"bytes {self.bad.start:#x} to {self.bad.stop:#x} cannot be read")
        return super().read_nowait(offset, segments)


class FailingDisk(Blk):
    """A disk in RAM whose sectors ``first`` to ``first + count - 1`` cannot be read."""

    def __init__(
        self,
        *,
        size: Annotated[Size, "of the disk"] = DEFAULT_SIZE,
        first: Annotated[int, "the first sector (of 512 bytes) that cannot be read"] = 8,
        count: Annotated[int, "how many sectors cannot be read"] = 1,
    ) -> None:
        super().__init__(backend=Scratched(size, range(first * SECTOR_SIZE, (first + count) * SECTOR_SIZE)))


if __name__ == "__main__":
    main(FailingDisk)
