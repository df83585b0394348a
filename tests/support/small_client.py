"""A client of a served device that writes its status register: without a guest, without memory."""

import contextlib
import socket
import struct
from collections.abc import Iterator

from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags
from vfiouser_virtio.testing.raw.client import RawClient

DEVICE_STATUS = 0x14


@contextlib.contextmanager
def client_of(path: str) -> Iterator[RawClient]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        yield RawClient(sock)


def status_write(client: RawClient, value: int) -> bytes:
    """A posted write of device_status, as a guest's CPU makes them."""
    return client.request(Command.REGION_WRITE, struct.pack("<QIIB", DEVICE_STATUS, 4, 1, value), MessageFlags.NO_REPLY)


async def read_status(client: RawClient) -> int:
    reply = await client.call(Command.REGION_READ, struct.pack("<QII", DEVICE_STATUS, 4, 1))
    assert reply.error == 0
    return reply.raw[-1]


async def cause_warnings(client: RawClient, count: int) -> None:
    """Each a reset, and FEATURES_OK without VERSION_1."""
    for _ in range(count // 10):
        await client.send(b"".join(status_write(client, value) for _ in range(10) for value in (0, 0x0B)))
    assert await read_status(client) == 0x03
