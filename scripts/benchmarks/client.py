"""Blocking vfio-user client with one split queue: no event loop of its own in what is measured."""

import os
import socket
import struct
from array import array
from collections.abc import Iterable
from typing import Self

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    HEADER_CODEC,
    REGION_ACCESS_CODEC,
    Command,
    MessageFlags,
    PciRegion,
)
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, RegisterWrite, enable_queue, negotiate
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.testing.raw.split import RawSplitRing, linked

RAM_SIZE = 16 << 20
DESC, AVAIL, USED, DATA = 0x0000, 0x4000, 0x8000, 0x10_0000
NOTIFY = 0x3000
_CAPABILITIES = b'{"capabilities": {"max_msg_fds": 8, "write_multiple": true}}\0'
_BAR = PciRegion.BAR4


class BlockingClient:
    """Client that connects, maps RAM in one or more regions, and sends one message at a time. A context manager."""

    def __init__(self, path: str, *, regions: int = 1) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.ram = SharedMemory(RAM_SIZE, address=0)
        self.ring: RawSplitRing
        """The first queue's, after `start`."""
        self.call(Command.VERSION, bytes(4) + _CAPABILITIES)
        size = RAM_SIZE // regions
        for offset in range(0, RAM_SIZE, size):
            self.map(offset, offset, size)
        self.write(PciRegion.CONFIG, 4, b"\x06\x04")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.ram.close()

    def call(self, command: int, payload: bytes, fds: list[int] | None = None) -> bytes:
        """One request and its reply's payload."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        # What is measured has this in it: no call of another function, no object for the reply.
        message = HEADER_CODEC.pack(1, command, HEADER_CODEC.size + len(payload), 0, 0) + payload
        self.socket.sendmsg([message], rights)
        reply = self.socket.recv(HEADER_CODEC.size + len(payload) + 4096)
        error = HEADER_CODEC.unpack_from(reply)[4]
        if error:
            raise OSError(error, os.strerror(error))
        return reply[HEADER_CODEC.size :]

    def map(self, address: int, offset: int, size: int) -> None:
        """DMA_MAP a part of the RAM."""
        assert self.ram.fd is not None
        fields = {"argsz": DMA_MAP.sizeof(), "flags": 3, "offset": offset, "address": address, "size": size}
        self.call(Command.DMA_MAP, DMA_MAP.build(fields), [self.ram.fd])

    def read(self, region: int, offset: int, size: int) -> int:
        """A register."""
        reply = self.call(Command.REGION_READ, REGION_ACCESS_CODEC.pack(offset, region, size))
        return int.from_bytes(reply[REGION_ACCESS_CODEC.size :], "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """A register."""
        self.call(Command.REGION_WRITE, REGION_ACCESS_CODEC.pack(offset, region, len(data)) + data)

    def post(self, region: int, offset: int, data: bytes) -> None:
        """Write to a register, and do not wait."""
        self.socket.sendall(posted_write(region, offset, data))

    def set(self, name: str, value: int) -> None:
        """A field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        self.write(_BAR, offset, value.to_bytes(size, "little"))

    def set_all(self, writes: Iterable[RegisterWrite]) -> None:
        """`set` one after the other."""
        for name, value in writes:
            self.set(name, value)

    def start(self, features: int = 0) -> None:
        """Bring the device up with its first queue; ``features`` are those besides VERSION_1."""
        self.negotiate(features)
        self.enable_queue(0, None, DESC, AVAIL, USED)
        self.ring = RawSplitRing(self.ram, self.read(_BAR, *COMMON_CFG_OFFSETS["queue_size"]), (DESC, AVAIL, USED))
        self.set("device_status", DRIVER_OK)

    def negotiate(self, features: int = 0) -> None:
        """Up to FEATURES_OK, with VERSION_1 and ``features``."""
        self.set("device_status", 0)
        self.set_all(negotiate(features | 1 << 32))

    def enable_queue(self, index: int, size: int | None, desc: int, driver: int, device: int) -> None:
        """Enable a queue at these addresses; without ``size``, as large as the device offers it."""
        self.set_all(enable_queue(index, (desc, driver, device), size=size))

    def read_sectors(self, count: int) -> None:
        """Make ``count`` block reads of 4 KiB available at once, and kick."""
        for number in range(count):
            header = DATA + 0x2000 * number
            self.ram.write(header, struct.pack("<IIQ", 0, 0, 8 * number))
            segments = (header, 16, 0), (header + 0x1000, 4096, WRITE), (header + 16, 1, WRITE)
            places = range(3 * number, 3 * number + 3)
            for place, descriptor in zip(places, linked(segments, places), strict=True):
                self.ring.describe(place, descriptor)
        self.ring.offer(*range(0, 3 * count, 3))
        self.write(_BAR, NOTIFY, bytes(2))

    @property
    def used(self) -> int:
        """How many requests have come back."""
        return self.ring.used_idx

    def status(self) -> int:
        """One register round trip."""
        return self.read(_BAR, *COMMON_CFG_OFFSETS["device_status"])


def posted_write(region: int, offset: int, data: bytes) -> bytes:
    """The message of a register write without a reply."""
    body = REGION_ACCESS_CODEC.pack(offset, region, len(data)) + data
    size, flags = HEADER_CODEC.size + len(body), MessageFlags.NO_REPLY
    return HEADER_CODEC.pack(1, Command.REGION_WRITE, size, flags, 0) + body
