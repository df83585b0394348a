"""vfio-user client API ("Commands"): a device as QEMU sees it, from a test, without a virtual machine.

::

    with SharedMemory(16 << 20) as ram:
        async with connect("/run/x/blk0.sock", memory=[ram]) as client:
            ids = await client.config_read(0, 4)
"""

import errno
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.dma import DmaRegion
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.protocols.vfio_user import Command, IrqSetFlags, PciIrq, PciRegion
from vfiouser_virtio.vfio_device import Buffer, DeviceInfo, IrqInfo, RegionInfo
from vfiouser_virtio.vfio_user.client import commands
from vfiouser_virtio.vfio_user.client.commands import REGION_INFO_SIZE, IoFd
from vfiouser_virtio.vfio_user.client.connecting import open_socket
from vfiouser_virtio.vfio_user.client.connection import ClientConnection
from vfiouser_virtio.vfio_user.client.dma import Mapping
from vfiouser_virtio.vfio_user.client.irqs import Handler, IrqRoutes
from vfiouser_virtio.vfio_user.client.options import ClientOptions
from vfiouser_virtio.vfio_user.client.region_mapping import map_region
from vfiouser_virtio.vfio_user.wire.connection import MAX_DATA_XFER_SIZE


class Client(ClientConnection):
    """Client of one device, by commands; as a ``guest.ports.PciPort``, by registers. `connect` makes one."""

    def __init__(self, sock: socket.socket, name: str, options: ClientOptions, nursery: trio.Nursery) -> None:
        super().__init__(sock, name, options, nursery)
        self._irqs = IrqRoutes(name, self.set_irqs, nursery)
        self._io_fds: dict[int, list[IoFd]] = {}
        self._regions: dict[int, RegionInfo] = {}

    def close(self) -> None:
        """End the connection, and close all fds but those of the memory."""
        self._irqs.close()
        super().close()

    # What there is

    async def device_info(self) -> DeviceInfo:
        """DEVICE_GET_INFO."""
        reply = await self.request(Command.DEVICE_GET_INFO, commands.device_info_request())
        return commands.parse_device_info(reply.payload)

    async def region_info(self, index: int, *, argsz: int = REGION_INFO_SIZE) -> RegionInfo:
        """DEVICE_GET_REGION_INFO, asked a second time where ``argsz`` bytes were not enough for all capabilities.

        The region's fds are the client's, and closed with it.
        """
        request = commands.region_info_request(index, argsz)
        reply = await self.request(Command.DEVICE_GET_REGION_INFO, request)
        needed = commands.region_info_argsz(reply.payload)
        if needed > argsz:
            reply.close()  # they come again
            request = commands.region_info_request(index, self._checked_argsz("DEVICE_GET_REGION_INFO", needed))
            reply = await self.request(Command.DEVICE_GET_REGION_INFO, request)
        return commands.parse_region_info(index, reply.payload, reply.fds)

    async def io_fds(self, index: int) -> list[IoFd]:
        """DEVICE_GET_REGION_IO_FDS of one region: first how large the answer is, then the answer."""
        reply = await self.request(Command.DEVICE_GET_REGION_IO_FDS, commands.io_fds_request(index))
        needed = commands.io_fds_argsz(reply.payload)
        if needed > len(commands.io_fds_request(index)):
            reply.close()
            request = commands.io_fds_request(index, self._checked_argsz("DEVICE_GET_REGION_IO_FDS", needed))
            reply = await self.request(Command.DEVICE_GET_REGION_IO_FDS, request)
        return commands.parse_io_fds(index, reply.payload, reply.fds)

    async def irq_info(self, index: int) -> IrqInfo:
        """DEVICE_GET_IRQ_INFO."""
        reply = await self.request(Command.DEVICE_GET_IRQ_INFO, commands.irq_info_request(index))
        return commands.parse_irq_info(index, reply.payload)

    def _checked_argsz(self, command: str, argsz: int) -> int:
        if argsz > MAX_DATA_XFER_SIZE:
            raise PeerError(f"{command}: the reply has argsz {argsz:#x}, more than any message", errno.EPROTO)
        return argsz

    # Regions

    async def region_read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ: exactly ``count`` bytes."""
        access = commands.region_access(region, offset, count)
        reply = await self.request(Command.REGION_READ, access)
        return commands.parse_region_read(access, reply.payload)

    async def region_write(self, region: int, offset: int, data: Buffer) -> None:
        """REGION_WRITE; returns when the server has confirmed it. Only strict clients want a confirmation in full."""
        access = commands.region_access(region, offset, len(data))
        reply = await self.request(Command.REGION_WRITE, access + data)
        if reply.payload or self._strict:
            commands.check_access(Command.REGION_WRITE, access, reply.payload)

    def region_post(self, region: int, offset: int, data: Buffer) -> None:
        """REGION_WRITE without a reply (NO_REPLY), as QEMU writes to memory BARs."""
        self.post(Command.REGION_WRITE, commands.region_access(region, offset, len(data)) + data)

    async def region_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> int:
        """REGION_WRITE_MULTI of (region, offset, 1 to 8 bytes); returns how many the server says it did."""
        reply = await self.request(Command.REGION_WRITE_MULTI, commands.write_multi_request(writes))
        return commands.parse_write_multi(reply.payload)

    def post_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> None:
        """REGION_WRITE_MULTI without a reply, as QEMU sends it."""
        self.post(Command.REGION_WRITE_MULTI, commands.write_multi_request(writes))

    async def device_reset(self) -> None:
        """DEVICE_RESET; returns when the device touches no memory any more."""
        await self.request(Command.DEVICE_RESET)

    # Memory

    @property
    def memory(self) -> DmaRegion:
        """The memory that was mapped first. Raises LookupError when there is none."""
        if not self._dma.mappings:
            raise LookupError(f"{self.name}: no memory is mapped; give some to connect(memory=...) or map_memory()")
        return self._dma.mappings[0].region

    async def map_memory(self, region: DmaRegion, *, readable: bool = True, writable: bool = True) -> None:
        """DMA_MAP a region, and serve it; it stays the caller's to close. What the device may do is up to the flags."""
        mapping = Mapping(region, readable, writable)
        self._dma.mappings.append(mapping)  # first: the server may read before we know that it has accepted
        try:
            await self.dma_map(region.address, region.size, readable=readable, writable=writable, fd=region.fd)
        except BaseException:
            self._dma.mappings.remove(mapping)
            raise

    async def unmap_memory(self, region: DmaRegion) -> None:
        """DMA_UNMAP a region; until the server has confirmed that, it is served."""
        await self.dma_unmap(region.address, region.size)
        self._dma.mappings = [mapping for mapping in self._dma.mappings if mapping.region is not region]

    async def dma_map(
        self,
        address: int,
        size: int,
        *,
        readable: bool = True,
        writable: bool = True,
        fd: int | None = None,
        offset: int = 0,
    ) -> None:
        """DMA_MAP and nothing else: without ``fd``, the server's DMA_READs there get ENODEV."""
        request = commands.dma_map_request(address, size, readable=readable, writable=writable, offset=offset)
        await self.request(Command.DMA_MAP, request, [] if fd is None else [fd])

    async def dma_unmap(self, address: int, size: int, *, flags: int = 0) -> None:
        """DMA_UNMAP and nothing else."""
        await self.request(Command.DMA_UNMAP, commands.dma_unmap_request(address, size, flags))

    # Interrupts

    async def set_irqs(
        self,
        index: int,
        flags: IrqSetFlags,
        start: int = 0,
        count: int = 0,
        *,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """DEVICE_SET_IRQS in one message: ``data`` is the array of DATA_BOOL, ``fds`` those of DATA_EVENTFD."""
        request = commands.set_irqs_request(index, flags, start, count, data)
        await self.request(Command.DEVICE_SET_IRQS, request, fds)

    async def connect_irqs(self, index: int, handlers: Sequence[Handler], start: int = 0) -> None:
        """Call ``handlers`` for interrupts ``start`` and so on of an index; an empty list disables the index.

        An interrupt that is signalled twice before its handler runs is one call. An exception of a handler ends the
        client's block.
        """
        await self._irqs.connect(index, handlers, start, max_fds=self._max_fds)

    @property
    def _max_fds(self) -> int:
        return self.version.max_msg_fds if self.version else 1

    async def connect_msix(self, handlers: Sequence[Handler]) -> None:
        """MSI-X vectors 0 … len-1 (``PciPort``)."""
        await self.connect_irqs(PciIrq.MSIX, handlers)

    async def connect_msi(self, handlers: Sequence[Handler]) -> None:
        """MSI vectors 0 … len-1; as `connect_msix`."""
        await self.connect_irqs(PciIrq.MSI, handlers)

    async def connect_intx(self, handler: Handler | None, *, resample: bool = False) -> None:
        """INTx (``PciPort``): it is masked when it fires, and unmasked after the handler, as QEMU does it.

        ``resample`` unmasks by an eventfd instead of SET_IRQS, as QEMU does it with KVM.
        """
        if handler is None:
            await self.connect_irqs(PciIrq.INTX, [])
        else:
            await self._irqs.connect_intx(handler, resample=resample)

    # A PCI function (guest.ports.PciPort)

    async def config_read(self, offset: int, size: int) -> int:
        """``size`` bytes of configuration space, little-endian."""
        return int.from_bytes(await self.region_read(PciRegion.CONFIG, offset, size), "little")

    async def config_write(self, offset: int, size: int, value: int) -> None:
        """Returns when the device has seen it."""
        await self.region_write(PciRegion.CONFIG, offset, value.to_bytes(size, "little"))

    async def bar_read(self, bar: int, offset: int, size: int) -> int:
        """``size`` bytes of BAR 0 to 5, little-endian."""
        return int.from_bytes(await self.region_read(bar, offset, size), "little")

    async def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Returns when the device has seen it."""
        await self.region_write(bar, offset, value.to_bytes(size, "little"))

    def bar_post(self, bar: int, offset: int, size: int, value: int) -> None:
        """A posted write, or, after `use_io_fds`, the signal of an ioeventfd: that one is in no order with messages."""
        for entry in self._io_fds.get(bar, ()):
            if entry.takes(offset, size, value):
                signal(entry.fd)
                return
        self.region_post(bar, offset, value.to_bytes(size, "little"))

    async def bar_map(self, bar: int, offset: int, size: int) -> memoryview:
        """Memory of a BAR without messages, until no view of it is left; errors as `map_region`.

        COMMAND.MEMORY is not looked at: to turn it off takes no mapping away.
        """
        if bar not in self._regions:
            self._regions[bar] = await self.region_info(bar)
        return map_region(bar, self._regions[bar], offset, size)

    async def use_io_fds(self, bar: int) -> int:
        """From now on `bar_post` signals the ioeventfds of this BAR where it can; returns how many there are."""
        self._io_fds[bar] = await self.io_fds(bar)
        return len(self._io_fds[bar])


@asynccontextmanager
async def connect(
    target: str | os.PathLike[str] | socket.socket,
    *,
    options: ClientOptions = ClientOptions(),  # noqa: B008 - it is frozen
    memory: Sequence[DmaRegion] = (),
) -> AsyncIterator[Client]:
    """A client of the server at ``target``: a path, or a connected socket, which is closed in the end.

    It has negotiated its version, and mapped ``memory``, which stays the caller's. Raises ConnectError without a
    listener, and whatever `Client.negotiate` and `Client.map_memory` raise. An exception of the block, or of an
    interrupt's handler, comes out as it is.
    """
    sock, path = await open_socket(target, options.timeout)
    async with background() as tasks:
        client = Client(sock, options.name or path, options, tasks)
        try:
            if options.version is not None:
                await client.negotiate(options.version)
                for region in memory:
                    await client.map_memory(region)
            yield client
        finally:
            client.close()
