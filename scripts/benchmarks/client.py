"""A small blocking vfio-user client with one split queue: no event loop of its own in what is measured."""

import json
import os
import socket
import struct
from array import array
from typing import Self

from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    HEADER_CODEC,
    REGION_ACCESS_CODEC,
    Command,
    MessageFlags,
    PciRegion,
)
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags

RAM_SIZE = 16 << 20
DESC, AVAIL, USED, DATA = 0x0000, 0x4000, 0x8000, 0x10_0000
NOTIFY = 0x3000
_CAPABILITIES = {"max_msg_fds": 8, "write_multiple": True}
_BAR = PciRegion.BAR4


class Client:
    """Connects, maps RAM in one or more regions, and does what it is told, one message at a time. A context manager."""

    def __init__(self, path: str, *, regions: int = 1) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram, RAM_SIZE)
        self.call(Command.VERSION, bytes(4) + json.dumps({"capabilities": _CAPABILITIES}).encode() + b"\0")
        size = RAM_SIZE // regions
        for offset in range(0, RAM_SIZE, size):
            fields = {"argsz": DMA_MAP.sizeof(), "flags": 3, "offset": offset, "address": offset, "size": size}
            self.call(Command.DMA_MAP, DMA_MAP.build(fields), [self.ram])
        self.write(PciRegion.CONFIG, 4, b"\x06\x04")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        os.close(self.ram)

    def call(self, command: int, payload: bytes, fds: list[int] | None = None) -> bytes:
        """One request and its reply's payload."""
        message = HEADER_CODEC.pack(1, command, HEADER_CODEC.size + len(payload), 0, 0) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.socket.sendmsg([message], rights)
        reply = self.socket.recv(HEADER_CODEC.size + len(payload) + 4096)
        error = HEADER_CODEC.unpack_from(reply)[4]
        if error:
            raise OSError(error, os.strerror(error))
        return reply[HEADER_CODEC.size :]

    def read(self, region: int, offset: int, size: int) -> int:
        """A register."""
        reply = self.call(Command.REGION_READ, REGION_ACCESS_CODEC.pack(offset, region, size))
        return int.from_bytes(reply[REGION_ACCESS_CODEC.size :], "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """A register."""
        self.call(Command.REGION_WRITE, REGION_ACCESS_CODEC.pack(offset, region, len(data)) + data)

    def post(self, region: int, offset: int, data: bytes) -> None:
        """Write to a register, and do not wait."""
        body = REGION_ACCESS_CODEC.pack(offset, region, len(data)) + data
        size, flags = HEADER_CODEC.size + len(body), MessageFlags.NO_REPLY
        self.socket.sendall(HEADER_CODEC.pack(1, Command.REGION_WRITE, size, flags, 0) + body)

    def set(self, name: str, value: int) -> None:
        """A field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        self.write(_BAR, offset, value.to_bytes(size, "little"))

    def start(self, features: int = 0) -> None:
        """Bring the device up with its first queue; ``features`` are those below bit 32."""
        self.negotiate(features)
        self.enable_queue(0, None, DESC, AVAIL, USED)
        self.set("device_status", 15)

    def negotiate(self, features: int = 0) -> None:
        """Up to FEATURES_OK, with VERSION_1 and ``features``, which are those below bit 32."""
        for status in (0, 1, 3):
            self.set("device_status", status)
        for select, accepted in enumerate((features, 1)):
            self.set("driver_feature_select", select)
            self.set("driver_feature", accepted)
        self.set("device_status", 11)

    def enable_queue(self, index: int, size: int | None, desc: int, driver: int, device: int) -> None:
        """Enable a queue at these addresses; without ``size``, as large as the device offers it."""
        self.set("queue_select", index)
        if size is not None:
            self.set("queue_size", size)
        for name, address in (("queue_desc", desc), ("queue_driver", driver), ("queue_device", device)):
            self.set(name, address)
        self.set("queue_enable", 1)

    def read_sectors(self, count: int) -> None:
        """Make ``count`` block reads of 4 KiB available at once, and kick."""
        for number in range(count):
            header = DATA + 0x2000 * number
            os.pwrite(self.ram, struct.pack("<IIQ", 0, 0, 8 * number), header)
            buffers = (header, 16, DescFlags.NEXT), (header + 0x1000, 4096, DescFlags.NEXT | DescFlags.WRITE)
            for index, (address, length, flags) in enumerate((*buffers, (header + 16, 1, DescFlags.WRITE))):
                descriptor = DESC_CODEC.pack(address, length, flags, 3 * number + index + 1)
                os.pwrite(self.ram, descriptor, DESC + DESC_CODEC.size * (3 * number + index))
            os.pwrite(self.ram, struct.pack("<H", 3 * number), AVAIL + 4 + 2 * number)
        os.pwrite(self.ram, struct.pack("<H", count), AVAIL + 2)
        self.write(_BAR, NOTIFY, bytes(2))

    @property
    def used(self) -> int:
        """How many requests have come back."""
        return int(struct.unpack("<H", os.pread(self.ram, 2, USED + 2))[0])

    def status(self) -> int:
        """One register round trip."""
        return self.read(_BAR, *COMMON_CFG_OFFSETS["device_status"])
