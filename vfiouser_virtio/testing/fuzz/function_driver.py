"""Driver of a PCI function through messages only: registers of regions, memory, and what a machine does before it.

What all drivers of the fuzzer have: `FuzzDriver` is that of a virtio device, `PciFuzzDriver` that of an author's own.
"""

import struct
from collections.abc import Sequence
from contextlib import suppress

from vfiouser_virtio.protocols.codec import codec, offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, CapId
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, DMA_UNMAP, Command, DmaUnmapFlags, PciRegion
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import Asked, FuzzClient
from vfiouser_virtio.testing.fuzz.ram import PIECES, FuzzRam
from vfiouser_virtio.vfio_device import VfioDevice

COMMAND_AT, _ = offsets(TYPE0_HEADER)["command"]
_CAPABILITIES_AT, _ = offsets(TYPE0_HEADER)["capability_list"]
_DECODED_AND_MASTER = 0x7
_DMA_MAP, _DMA_UNMAP = codec(DMA_MAP), codec(DMA_UNMAP)


def capability(space: bytes, name: int) -> int:
    """Where a capability is in config space; 0 where it is not, or the list is none: a device may lie, or be gone."""
    at, seen = space[_CAPABILITIES_AT], set[int]()
    while 0 < at < len(space) - 1 and at not in seen:
        if space[at] == name:
            return at
        seen.add(at)
        at = space[at + 1]
    return 0


class FunctionDriver:
    """Driver on one connection. Every call comes back early where the server has hung up."""

    def __init__(self, client: FuzzClient, ram: FuzzRam, memory: Memory, function: VfioDevice | None = None) -> None:
        """``function``: its registers are accessed without the socket."""
        self.client = client
        self.ram = ram
        self.memory: Memory = memory
        self._function = function
        self._pm_cap: int | None = None

    @property
    def is_direct(self) -> bool:
        """Registers are accessed without the socket."""
        return self._function is not None

    # ---- registers -----------------------------------------------------------------------------------------------

    async def read(self, region: int, offset: int, count: int) -> int:
        """A register's value; 0 where there was no answer, or a refusal."""
        return await self._value(await self._ask(region, offset, count))

    async def _ask(self, region: int, offset: int, count: int) -> Asked | int | None:
        if self._function is not None:
            if self.client.closed.is_set():
                return 0
            try:
                return int.from_bytes(self._function.region_read(region, offset, count), "little")
            except OSError:
                return 0
        return await self.client.ask(Command.REGION_READ, struct.pack("<QII", offset, region, count))

    async def _value(self, asked: Asked | int | None) -> int:
        if isinstance(asked, int):
            return asked
        reply = await self.client.result(asked)
        return 0 if reply is None or reply.error else int.from_bytes(reply.body[16:], "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """A posted write, as QEMU's are; it goes out with the next request."""
        if self._function is not None:
            if not self.client.closed.is_set():
                with suppress(OSError):
                    self._function.region_write(region, offset, data)
            return
        self.client.post(Command.REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    # ---- memory --------------------------------------------------------------------------------------------------

    async def map(self, pieces: Sequence[int] = range(len(PIECES))) -> None:
        """Pieces of the RAM, by index, each with its file descriptor or without."""
        asked: list[Asked | None] = []
        for piece in (PIECES[index] for index in pieces):
            private = self.memory == "private" or (self.memory == "mixed" and piece.private_if_mixed)
            offset = 0 if private else piece.address
            body = _DMA_MAP.pack(_DMA_MAP.size, piece.flags, offset, piece.address, piece.size)
            asked.append(await self.client.ask(Command.DMA_MAP, body, [] if private else [self.ram.fd]))
        for each in asked:
            await self.client.result(each)

    async def unmap(self, pieces: Sequence[int]) -> None:
        """Pieces of the RAM go."""
        for piece in (PIECES[index] for index in pieces):
            await self._unmap(0, piece.address, piece.size)

    async def unmap_all(self) -> None:
        """All memory goes, whatever it is."""
        await self._unmap(DmaUnmapFlags.ALL, 0, 0)

    async def _unmap(self, flags: int, address: int, size: int) -> None:
        body = _DMA_UNMAP.pack(_DMA_UNMAP.size, flags, address, size)
        await self.client.call(Command.DMA_UNMAP, body)

    async def wake(self) -> None:
        """D0, memory decoding and bus mastering on: what a machine does before its driver looks at a device."""
        if self._pm_cap is None:
            space = (await self.read(PciRegion.CONFIG, 0, 256)).to_bytes(256, "little")
            self._pm_cap = capability(space, CapId.PM)
        if self._pm_cap:
            self.write(PciRegion.CONFIG, self._pm_cap + 4, b"\0\0")
        self.write(PciRegion.CONFIG, COMMAND_AT, _DECODED_AND_MASTER.to_bytes(2, "little"))
