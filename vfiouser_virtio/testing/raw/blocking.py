"""Blocking raw vfio-user client with one split queue: no event loop, so that little of what is measured is its own.

What it sends is what it is told: benchmarks stand on it, and the clients of the fuzzer that attack a server process.
"""

import os
import socket
import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Self

from vfiouser_virtio.dma import DmaRegion, SharedMemory
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    DMA_UNMAP,
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
CAPABILITIES = '{"capabilities": {"max_msg_fds": 8, "write_multiple": true}}'
_BAR = PciRegion.BAR4
_MOST_FDS = 64
_AT_ONCE = 64  # messages; a UNIX socket has room for more, and their replies for as many
_DMA_MAP_CODEC = codec(DMA_MAP)


class BlockingClient:
    """Client that connects, maps RAM in one or more regions, and sends one message at a time. A context manager.

    ``memory`` is its RAM, by default shared memory of 16 MiB; it is the client's from here on. ``timeout`` is that of
    each system call on the socket, in seconds; TimeoutError then. ``sock`` is a socket to connect, also the client's.
    Of an error reply it raises OSError, of a server that has hung up ConnectionError.
    """

    def __init__(
        self,
        path: str,
        *,
        regions: int = 1,
        memory: DmaRegion | None = None,
        timeout: float | None = None,
        capabilities: str = CAPABILITIES,
        sock: socket.socket | None = None,
    ) -> None:
        self.ram = SharedMemory(RAM_SIZE, address=0) if memory is None else memory
        self.ring: RawSplitRing
        """The first queue's, after `start`."""
        self.socket = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout)
            self.socket.connect(path)
            self.call(Command.VERSION, bytes(4) + capabilities.encode() + b"\0")
            size = self.ram.size // regions
            for offset in range(0, self.ram.size, size):
                self.map(self.ram.address + offset, offset, size)
            self.write(PciRegion.CONFIG, 4, b"\x06\x04")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, and let the RAM go."""
        self.socket.close()
        self.ram.close()

    def call(self, command: int, payload: bytes, fds: Sequence[int] | None = None) -> bytes:
        """One request and its reply's payload."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        # What is measured has this in it: no call of another function, no object for the reply.
        size = HEADER_CODEC.size + len(payload)
        message = HEADER_CODEC.pack(1, command, size, 0, 0) + payload
        if (sent := self.socket.sendmsg([message], rights)) < size:
            self.socket.sendall(message[sent:])
        reply = self.socket.recv(size + 4096)
        if len(reply) < HEADER_CODEC.size or len(reply) < HEADER_CODEC.unpack_from(reply)[2]:
            reply = self._whole(reply)
        error = HEADER_CODEC.unpack_from(reply)[4]
        if error:
            raise OSError(error, os.strerror(error))
        return reply[HEADER_CODEC.size :]

    def call_for_fds(self, command: int, payload: bytes) -> tuple[bytes, list[int]]:
        """`call` of a request that is answered with file descriptors, which are the caller's."""
        self.socket.sendall(HEADER_CODEC.pack(1, command, HEADER_CODEC.size + len(payload), 0, 0) + payload)
        reply, fds, _flags, _address = socket.recv_fds(self.socket, 4096, _MOST_FDS)
        reply = self._whole(reply)
        if error := HEADER_CODEC.unpack_from(reply)[4]:
            raise OSError(error, os.strerror(error))
        return reply[HEADER_CODEC.size :], fds

    def _whole(self, reply: bytes) -> bytes:
        """A reply of which this is the beginning."""
        while len(reply) < HEADER_CODEC.size or len(reply) < HEADER_CODEC.unpack_from(reply)[2]:
            more = self.socket.recv(1 << 20)
            if not more:
                raise ConnectionResetError("the server has hung up")
            reply += more
        return reply

    def map(self, address: int, offset: int, size: int, flags: int = 3) -> None:
        """DMA_MAP a part of the RAM's file."""
        assert self.ram.fd is not None
        fields = {"argsz": DMA_MAP.sizeof(), "flags": flags, "offset": offset, "address": address, "size": size}
        self.call(Command.DMA_MAP, DMA_MAP.build(fields), [self.ram.fd])

    def map_all(self, places: Iterable[tuple[int, int]], size: int) -> None:
        """DMA_MAP parts of the RAM's file, (address, offset) each; many go out before their replies are looked at.

        Raises the OSError of the first one that is refused, when all of those beside it are answered.
        """
        assert self.ram.fd is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [self.ram.fd]))]
        head = HEADER_CODEC.pack(1, Command.DMA_MAP, HEADER_CODEC.size + _DMA_MAP_CODEC.size, 0, 0)
        left = iter(places)
        while some := list(islice(left, _AT_ONCE)):
            for address, offset in some:
                message = head + _DMA_MAP_CODEC.pack(_DMA_MAP_CODEC.size, 3, offset, address, size)
                if (sent := self.socket.sendmsg([message], rights)) < len(message):
                    self.socket.sendall(message[sent:])
            replies = self._read(len(some) * HEADER_CODEC.size)
            for _, _, _, _, error in HEADER_CODEC.iter_unpack(replies):
                if error:
                    raise OSError(error, os.strerror(error))

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            if not (more := self.socket.recv(size - len(found))):
                raise ConnectionResetError("the server has hung up")
            found += more
        return found

    def unmap(self, address: int, size: int) -> None:
        """DMA_UNMAP a range."""
        fields = {"argsz": DMA_UNMAP.sizeof(), "flags": 0, "address": address, "size": size}
        self.call(Command.DMA_UNMAP, DMA_UNMAP.build(fields))

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

    def kick(self, queue: int = 0) -> None:
        """Notify a queue, and wait for the answer."""
        self.write(_BAR, NOTIFY + 4 * queue, queue.to_bytes(2, "little"))

    def get(self, name: str) -> int:
        """A field of the common configuration."""
        return self.read(_BAR, *COMMON_CFG_OFFSETS[name])

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
        self.ring = RawSplitRing(self.ram, self.get("queue_size"), (DESC, AVAIL, USED))
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
        self.kick()

    @property
    def used(self) -> int:
        """How many requests have come back."""
        return self.ring.used_idx

    def status(self) -> int:
        """One register round trip."""
        return self.get("device_status")


def posted_write(region: int, offset: int, data: bytes) -> bytes:
    """The message of a register write without a reply."""
    body = REGION_ACCESS_CODEC.pack(offset, region, len(data)) + data
    size, flags = HEADER_CODEC.size + len(body), MessageFlags.NO_REPLY
    return HEADER_CODEC.pack(1, Command.REGION_WRITE, size, flags, 0) + body
