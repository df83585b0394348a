"""Messages of vfio-user as QEMU sends them, and parts to make others of."""

import struct
from collections.abc import Callable

import trio
import trio.testing

from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC
from vfiouser_virtio.testing.raw.client import QEMU_CAPABILITIES, RawClient

Connect = Callable[[], RawClient]


def header(message_id: int, command: int, size: int, flags: int = 0, error: int = 0) -> bytes:
    return HEADER_CODEC.pack(message_id, command, size, flags, error)


def write(region: int, offset: int, data: bytes) -> bytes:
    return struct.pack("<QII", offset, region, len(data)) + data


def read(region: int, offset: int, count: int) -> bytes:
    return struct.pack("<QII", offset, region, count)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.001)


# What QEMU 11.1.3 was seen to send, and what it accepted (facts about the QEMU client, 1.1 and 2.1).

VERSION = bytes.fromhex("00000100d6000000000000000000000000000000") + QEMU_CAPABILITIES.encode() + b"\0"
DMA_MAP = bytes.fromhex(
    "010002003000000000000000000000002000000003000000000000000000000000000000000000000000002000000000"
)
DMA_UNMAP = bytes.fromhex("27000300280000000000000000000000180000000000000000000000000000000000002000000000")
GET_INFO = bytes.fromhex("0300040020000000000000000000000010000000000000000000000000000000")
REGION_READ = bytes.fromhex("0c00090020000000000000000000000000000000000000000700000000010000")
REGION_WRITE = bytes.fromhex("0e000a002400000000000000000000003000000000000000070000000400000000f8ffff")
SET_IRQS = bytes.fromhex("190008002400000000000000000000001400000024000000000000000000000001000000")
RESET = bytes.fromhex("1e000d00100000000000000000000000")
