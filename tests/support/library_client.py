"""Requests of a client to a server over libvfio-user."""

import os
import struct
from collections.abc import Callable

import trio

from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import RawClient

Connect = Callable[[], RawClient]
PAGE = 4096
DISCONNECTED = ("disconnected",)


async def negotiate(client: RawClient) -> None:
    """`RawClient.version`, when the server is in this thread: it waits for the message while it is in C."""
    assert not (await client.version()).flags & 0x20


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.001)


async def write(client: RawClient, index: int, offset: int, data: bytes) -> int:
    """The errno of a REGION_WRITE."""
    reply = await client.call(Command.REGION_WRITE, struct.pack("<QII", offset, index, len(data)) + data)
    return int(reply.error)


async def read(client: RawClient, index: int, offset: int, count: int) -> bytes:
    reply = await client.call(Command.REGION_READ, struct.pack("<QII", offset, index, count))
    assert not reply.error, os.strerror(reply.error)
    return bytes(reply.body[16:])


async def dma_map(client: RawClient, address: int, size: int, fd: int | None, flags: int = 3) -> int:
    payload = struct.pack("<IIQQQ", 32, flags, 0, address, size)
    reply = await client.call(Command.DMA_MAP, payload, [] if fd is None else [fd])
    return int(reply.error)


async def dma_unmap(client: RawClient, address: int, size: int) -> int:
    reply = await client.call(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, address, size))
    return int(reply.error)


async def set_irqs(client: RawClient, index: int, flags: int, start: int, count: int, fds: tuple[int, ...] = ()) -> int:
    payload = struct.pack("<IIIII", 20, flags, index, start, count)
    reply = await client.call(Command.DEVICE_SET_IRQS, payload, fds)
    return int(reply.error)


def events(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
