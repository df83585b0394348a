"""A PCI function that is no virtio device: one BAR with a register that counts, and an interrupt for each write.

python examples/scratch_pci.py /tmp/scratch.sock, then in a QEMU with memory that can be shared:
-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/scratch.sock"}}'
"""

import sys

import trio

from vfiouser_virtio.pci import Bar, Identity, PciFunction
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user import Server, listen_path

COUNT = 0x0
"""Read: how often the scratch memory was written, 32 bits. All behind it is scratch memory."""


class Scratch:
    """4 KiB of memory in BAR0, whose first register counts."""

    def __init__(self) -> None:
        self.memory = bytearray(0x1000)
        self.function = PciFunction(Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000))
        self.function.add_bar(0, Bar(len(self.memory), self.read, self.write))
        self.function.add_msix(vectors=1, bar=1)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.memory[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        if offset < COUNT + 4:
            return  # the counter cannot be written
        self.memory[offset : offset + len(data)] = data
        count = int.from_bytes(self.memory[COUNT : COUNT + 4], "little") + 1
        self.memory[COUNT : COUNT + 4] = (count & 0xFFFF_FFFF).to_bytes(4, "little")
        self.function.raise_msix(0)


async def main(path: str) -> None:
    with listen_path(path) as listener:
        print("ready", path, flush=True)
        await Server(Scratch().function).serve(listener)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: scratch_pci.py SOCKET")
    try:
        trio.run(main, sys.argv[1])
    except KeyboardInterrupt:
        pass
