"""DMA server of a client ("VFIO_USER_DMA_MAP"): memory that the server maps, or reads and writes by messages.

::

    SharedMemory    DMA_MAP with an fd      the server maps it
    PrivateMemory   DMA_MAP without one     the server sends DMA_READ and DMA_WRITE, which `DmaServer` answers
"""

import errno
from dataclasses import dataclass

from vfiouser_virtio.dma import DmaRegion
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import DMA_ACCESS, Command
from vfiouser_virtio.vfio_user.wire.connection import MAX_DATA_XFER_SIZE, Message, error_reply, reply

_DMA_ACCESS = codec(DMA_ACCESS)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Region that the server knows, and what it may do there."""

    region: DmaRegion
    readable: bool
    writable: bool


class DmaServer:
    """Server of DMA_READ and DMA_WRITE from what is mapped, with QEMU's errnos ("Read and Write Operations")."""

    def __init__(self) -> None:
        self.mappings: list[Mapping] = []
        self.max_data_xfer_size = MAX_DATA_XFER_SIZE
        """How many bytes we let one message have, as we have told the server."""

    def answer(self, message: Message) -> bytes:
        """The reply to one request of the server, whether it wants one or not."""
        body = message.body
        reading = message.command == Command.DMA_READ
        if not reading and message.command != Command.DMA_WRITE:
            return _refuse(message, errno.ENOSYS)
        if message.fds or len(body) < _DMA_ACCESS.size:
            return _refuse(message, errno.EINVAL)
        address, count = _DMA_ACCESS.unpack_from(body)
        if count > self.max_data_xfer_size or (not reading and count > len(body) - _DMA_ACCESS.size):
            return _refuse(message, errno.E2BIG)
        parts = self._find(address, count, writing=not reading)
        if parts is None:
            return _refuse(message, errno.ENODEV)
        if reading:
            return reply(message.id, message.command, b"".join([_DMA_ACCESS.pack(address, count), *parts]))
        start = _DMA_ACCESS.size
        for part in parts:
            part[:] = body[start : start + len(part)]
            start += len(part)
        return reply(message.id, message.command, _DMA_ACCESS.pack(address, count))

    def _find(self, address: int, count: int, *, writing: bool) -> list[memoryview] | None:
        """The parts of the regions that make up the range; None where one is missing, or not for this."""
        parts = []
        while count:
            for mapping in self.mappings:
                region = mapping.region
                if region.address <= address < region.address + region.size:
                    break
            else:
                return None
            if not (mapping.writable if writing else mapping.readable):
                return None
            size = min(count, region.address + region.size - address)
            parts.append(region.at(address, size))
            address += size
            count -= size
        return parts


def _refuse(message: Message, number: int) -> bytes:
    return error_reply(message.id, message.command, number)
