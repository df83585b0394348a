"""A client that truncates the file of its memory while its disk works: ``truncating_client.py SOCKET UID``.

It is a process of its own, because an access of its own to that memory kills it, too.
"""

import mmap
import os
import sys
from functools import partial

import trio

from vfiouser_virtio.dma import DEFAULT_ADDRESS, DmaRegion
from vfiouser_virtio.guest import BlkDriver, Disk, bound_pci
from vfiouser_virtio.vfio_user import connect

SIZE = 16 << 20
READERS, READS = 8, 200
VIRTIO_BAR, NOTIFY = 4, 0x3000


class UnsealedMemory(DmaRegion):
    """A memfd that nobody can seal."""

    def __init__(self) -> None:
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, SIZE)
        self.mapping = mmap.mmap(fd, SIZE)
        super().__init__(memoryview(self.mapping), DEFAULT_ADDRESS, fd)


async def main(path: str) -> None:
    memory, seen = UnsealedMemory(), 0
    async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
        disk: Disk = device.driver_data

        async def read_on() -> None:
            nonlocal seen
            while True:
                data = await disk.read(seen % 64, 64)
                assert data[:4] == b"disk"
                seen += 1
                if seen == READS:
                    assert memory.fd is not None
                    # From here on nothing may be awaited. The others have requests in their ring.
                    os.ftruncate(memory.fd, 0)
                    client.bar_post(VIRTIO_BAR, NOTIFY, 2, 0)
                    os.write(1, b"truncated\n")
                    os.read(0, 1)  # until whoever has started us has seen enough
                    os._exit(0)

        async with trio.open_nursery() as nursery:
            for _ in range(READERS):
                nursery.start_soon(read_on)


if __name__ == "__main__":
    os.setresuid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
    trio.run(partial(main, sys.argv[1]))
