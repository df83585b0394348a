"""A small blocking vfio-user client with one split queue: no event loop of its own in what is measured."""

import json
import os
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from vfiouser_virtio.protocols.vfio_user import DMA_MAP, HEADER_CODEC, REGION_ACCESS_CODEC, Command, PciRegion
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags

RAM_SIZE = 16 << 20
DESC, AVAIL, USED, DATA = 0x0000, 0x4000, 0x8000, 0x10_0000
NOTIFY = 0x3000
_BAR = PciRegion.BAR4


@contextmanager
def served(*devices: str) -> Iterator[list[str]]:
    """``vfiouser-virtio serve`` in a process of its own; gives the paths of its sockets."""
    options = [word for device in devices for word in ("--device", device)]
    command = [sys.executable, "-m", "vfiouser_virtio", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        paths = []
        for line in process.stdout:
            if line.startswith("device "):
                paths.append(line.split()[3])
            if line.startswith("ready"):
                break
        try:
            yield paths
        finally:
            process.terminate()


class Client:
    """Connects, maps RAM, and does what it is told, one message at a time. A context manager."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram, RAM_SIZE)
        self.call(Command.VERSION, bytes(4) + json.dumps({"capabilities": {"max_msg_fds": 8}}).encode() + b"\0")
        fields = {"argsz": DMA_MAP.sizeof(), "flags": 3, "offset": 0, "address": 0, "size": RAM_SIZE}
        self.call(Command.DMA_MAP, DMA_MAP.build(fields), [self.ram])
        self.write(PciRegion.CONFIG, 4, b"\x06\x04")

    def __enter__(self) -> "Client":
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

    def set(self, name: str, value: int) -> None:
        """A field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        self.write(_BAR, offset, value.to_bytes(size, "little"))

    def start(self) -> int:
        """Bring the device up with its first queue; the queue's size."""
        for status in (0, 1, 3):
            self.set("device_status", status)
        self.set("driver_feature_select", 1)
        self.set("driver_feature", 1)  # VERSION_1 alone
        self.set("device_status", 11)
        for name, address in (("queue_desc", DESC), ("queue_driver", AVAIL), ("queue_device", USED)):
            self.set(name, address)
        size = self.read(_BAR, *COMMON_CFG_OFFSETS["queue_size"])
        self.set("queue_enable", 1)
        self.set("device_status", 15)
        return size

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
