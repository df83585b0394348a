"""Messages of a client read plainly (QEMU docs/interop/vfio-user.rst): what a server must do and answer for each.

The device behind it is `RecordedDevice`; the model and it have the few rules in common that a device decides.
"""

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_device import (
    Buffer,
    DeviceFlags,
    DeviceInfo,
    DmaClient,
    Hold,
    IoEventFd,
    IrqInfo,
    IrqInfoFlags,
    IrqSetFlags,
    RegionFlags,
    RegionInfo,
)

REGIONS, REGION_SIZE = 9, 0x1000
IRQS = (1, 1, 4, 0, 1)
"""How many interrupts each index has."""
_READ_WRITE = RegionFlags.READ | RegionFlags.WRITE
_DEVICE = DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, REGIONS, len(IRQS))
_CAPABILITY = (1, 2, bytes(range(12)))
_MOST_DATA, _MOST_MESSAGE, _MOST_FDS = 1 << 20, (1 << 20) + 4096, 16
_END = 1 << 64

Call = tuple[object, ...]
"""What a device was asked, and did not refuse: a word, and what came with it."""


class RecordedDevice:
    """`VfioDevice` that remembers what it was asked; file descriptors are closed."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def connected(self, client: DmaClient) -> None:
        """Nothing comes of it."""

    def disconnected(self) -> Hold | None:
        """Nothing is left."""
        return None

    def device_info(self) -> DeviceInfo:
        return _DEVICE

    def region_info(self, index: int) -> RegionInfo:
        if index >= REGIONS:
            raise PeerError("no such region")
        return RegionInfo(_READ_WRITE, REGION_SIZE, index << 40, (_CAPABILITY, _CAPABILITY) if index == 2 else ())

    def irq_info(self, index: int) -> IrqInfo:
        if index >= len(IRQS):
            raise PeerError("no such interrupt index")
        return IrqInfo(IrqInfoFlags.EVENTFD, IRQS[index])

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        if index >= REGIONS:
            raise PeerError("no such region")
        return ()

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        if index >= REGIONS or offset + count > REGION_SIZE:
            raise PeerError("beyond the region")
        self.calls.append(("read", index, offset, count))
        return bytes((offset & 0xFF,)) * count

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        if index >= REGIONS or offset + len(data) > REGION_SIZE:
            raise PeerError("beyond the region", errno.ERANGE if offset + len(data) <= _END else errno.EINVAL)
        self.calls.append(("write", index, offset, bytes(data)))

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        if fd is not None:
            close_all([fd])
        self.calls.append(("map", address, size, readable, writable, fd is not None, offset))

    def dma_unmap(self, address: int, size: int) -> Hold | None:
        self.calls.append(("unmap", address, size))
        return None

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        close_all(fds)
        self.calls.append(("irqs", index, int(flags), start, count, bytes(data), len(fds)))

    def reset(self) -> Hold | None:
        self.calls.append(("reset",))
        return None


class StreamOutcome(NamedTuple):
    """Outcome of a stream of messages."""

    calls: list[Call]
    replies: list[bytes]
    fatal: bool
    """The connection ends: what comes next cannot be told from anything."""


class _RefusedRequest(Exception):
    def __init__(self, number: int = errno.EINVAL) -> None:
        super().__init__(number)
        self.number = number


class ReceivedFds(NamedTuple):
    """File descriptors that come with the message at this place of the stream."""

    at: int
    eventfds: int
    others: int


def outcome(stream: bytes, fds: Sequence[ReceivedFds], *, write_multiple: bool) -> StreamOutcome:
    """Of all messages in the stream, after VERSION."""
    calls: list[Call] = []
    replies: list[bytes] = []
    at, end = 0, len(stream)
    while end - at >= 16:
        number, command, size, flags, _error = struct.unpack_from("<HHIII", stream, at)
        if not 16 <= size <= _MOST_MESSAGE:
            return StreamOutcome(calls, replies, True)
        if at + size > end:
            break
        eventfds, others = next(((each.eventfds, each.others) for each in fds if at == each.at), (0, 0))
        kind = flags & 0xF
        if kind > 1:
            return StreamOutcome(calls, replies, True)
        if kind == 0:  # else it is a reply that nobody has asked for
            answer = _Answer(stream[at + 16 : at + size], eventfds, others, write_multiple)
            try:
                payload = answer.to(command)
                error, reply_flags = 0, 1
            except _RefusedRequest as refused:
                payload, error, reply_flags = b"", refused.number, 0x21
            calls += answer.calls
            if not flags & 0x10:
                header = struct.pack("<HHIII", number, command, 16 + len(payload), reply_flags, error)
                replies.append(header + payload)
        at += size
    return StreamOutcome(calls, replies, False)


class _Answer:
    """Answer to one request."""

    def __init__(self, body: bytes, eventfds: int, others: int, write_multiple: bool) -> None:
        self.body = body
        self.calls: list[Call] = []
        self._eventfds, self._others = eventfds, others
        self._write_multiple = write_multiple

    def to(self, command: int) -> bytes:
        """The payload of the reply. Raises `_RefusedRequest`."""
        if self._eventfds + self._others > _MOST_FDS:
            raise _RefusedRequest
        handler = _HANDLERS.get(command)
        if handler is None:
            raise _RefusedRequest(_NEVER.get(command, errno.ENOSYS))
        return handler(self)

    def _u32(self, at: int) -> int:
        return int.from_bytes(self.body[at : at + 4], "little")

    def _u64(self, at: int) -> int:
        return int.from_bytes(self.body[at : at + 8], "little")

    def _fixed(self, size: int, *, argsz: bool = True) -> None:
        if len(self.body) < size or (argsz and self._u32(0) < size):
            raise _RefusedRequest

    def map(self) -> bytes:
        self._fixed(32)
        flags, offset, address, size = self._u32(4), self._u64(8), self._u64(16), self._u64(24)
        fds = self._eventfds + self._others
        if not size or address + size > _END or flags > 3 or offset + size > 1 << 63 or fds > 1:
            raise _RefusedRequest
        self.calls.append(("map", address, size, bool(flags & 1), bool(flags & 2), fds == 1, offset))
        return b""

    def unmap(self) -> bytes:
        self._fixed(24, argsz=False)
        flags, address, size = self._u32(4), self._u64(8), self._u64(16)
        if flags & 1:
            raise _RefusedRequest(errno.EOPNOTSUPP)
        if flags & ~2 or (flags & 2 and (address or size)):
            raise _RefusedRequest
        size = _END if flags & 2 else size
        if not size or address + size > _END:
            raise _RefusedRequest
        self.calls.append(("unmap", address, size))
        return self.body[:24] if self._u32(0) >= 24 else b""

    def info(self) -> bytes:
        self._fixed(16)
        return struct.pack("<4I", 16, 3, REGIONS, len(IRQS))

    def region_info(self) -> bytes:
        self._fixed(32)
        index = self._u32(8)
        if index >= REGIONS:
            raise _RefusedRequest
        if index != 2:
            return struct.pack("<4IQQ", 32, 3, index, 0, REGION_SIZE, index << 40)
        chain = b"".join(
            struct.pack("<HHI12s4x", 1, 2, following, _CAPABILITY[2]) for following in (32 + 24, 0)
        )  # bodies end at multiples of 8
        head = struct.pack("<4IQQ", 32 + len(chain), 3 | 8, index, 32, REGION_SIZE, index << 40)
        return head + chain if self._u32(0) >= 32 + len(chain) else head

    def io_fds(self) -> bytes:
        self._fixed(16)
        index = self._u32(8)
        if self._u32(4) or index >= REGIONS:
            raise _RefusedRequest
        return struct.pack("<4I", 16, 0, index, 0)

    def irq_info(self) -> bytes:
        self._fixed(16)
        index = self._u32(8)
        if index >= len(IRQS):
            raise _RefusedRequest
        return struct.pack("<4I", 16, 1, index, IRQS[index])

    def set_irqs(self) -> bytes:
        self._fixed(20)
        flags, index, start, count = (self._u32(at) for at in (4, 8, 12, 16))
        eventfds, others = (self._eventfds, self._others) if flags & 4 else (0, 0)
        data = self.body[20 : 20 + count] if flags & 2 else b""
        if index >= len(IRQS) or flags & 7 not in (1, 2, 4) or flags >> 3 not in (1, 2, 4):
            raise _RefusedRequest
        if (
            (not count and (flags != 1 | 32 or start))
            or start + count > IRQS[index]
            or len(data) < (flags & 2) * count // 2
        ):
            raise _RefusedRequest
        if others or eventfds not in (0, count):
            raise _RefusedRequest
        self.calls.append(("irqs", index, flags, start, count, data, eventfds))
        return b""

    def read(self) -> bytes:
        offset, region, count = self._access()
        if region >= REGIONS or offset + count > REGION_SIZE:
            raise _RefusedRequest
        self.calls.append(("read", region, offset, count))
        return self.body[:16] + bytes((offset & 0xFF,)) * count

    def write(self) -> bytes:
        offset, region, count = self._access()
        data = self.body[16 : 16 + count]
        if len(data) < count:
            raise _RefusedRequest
        if region >= REGIONS or offset + count > REGION_SIZE:
            raise _RefusedRequest(errno.ERANGE if offset + count <= _END else errno.EINVAL)
        self.calls.append(("write", region, offset, data))
        return self.body[:16]

    def _access(self) -> tuple[int, int, int]:
        self._fixed(16, argsz=False)
        offset, region, count = self._u64(0), self._u32(8), self._u32(12)
        if not 0 < count <= _MOST_DATA or offset + count > _END:
            raise _RefusedRequest
        return offset, region, count

    def write_multi(self) -> bytes:
        if not self._write_multiple:
            raise _RefusedRequest(errno.EOPNOTSUPP)
        self._fixed(8, argsz=False)
        count = self._u64(0)
        if 24 * count > len(self.body) - 8:
            raise _RefusedRequest
        writes = [struct.unpack_from("<QII8s", self.body, 8 + 24 * number) for number in range(count)]
        if any(not 0 < size <= 8 or offset + size > _END for offset, _region, size, _data in writes):
            raise _RefusedRequest
        refused = False
        for offset, region, size, data in writes:
            if region >= REGIONS or offset + size > REGION_SIZE:
                refused = True
            else:
                self.calls.append(("write", region, offset, data[:size]))
        if refused:
            raise _RefusedRequest(errno.ERANGE)
        return self.body[:8]

    def reset(self) -> bytes:
        self.calls.append(("reset",))
        return b""


_HANDLERS = {
    2: _Answer.map,
    3: _Answer.unmap,
    4: _Answer.info,
    5: _Answer.region_info,
    6: _Answer.io_fds,
    7: _Answer.irq_info,
    8: _Answer.set_irqs,
    9: _Answer.read,
    10: _Answer.write,
    13: _Answer.reset,
    15: _Answer.write_multi,
}
_NEVER = {
    1: errno.EINVAL,
    11: errno.EINVAL,
    12: errno.EINVAL,
    14: errno.EOPNOTSUPP,
    16: errno.ENOTTY,
    17: errno.EOPNOTSUPP,
    18: errno.EOPNOTSUPP,
}
"""What no client of this server may ask, and how it is told so."""
