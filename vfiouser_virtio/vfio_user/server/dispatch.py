"""Dispatch of a client's requests ("Commands"): each is checked and turned into one call on the `VfioDevice`.

What is not offered gets a defined errno: ENOSYS for an unknown command (QEMU's own answer to one), EOPNOTSUPP for
migration data and dirty pages, ENOTTY for DEVICE_FEATURE (what VFIO says of a feature that a device does not have;
QEMU takes it for "cannot migrate").
"""

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import CLOSER, MOST_LEFT_OPEN, close_all
from vfiouser_virtio.irq_set import check_irq_set
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    DMA_MAP,
    DMA_UNMAP,
    INFO_CAP_HEADER,
    IOEVENTFD,
    IRQ_INFO,
    IRQ_SET,
    REGION_ACCESS_CODEC,
    REGION_INFO,
    REGION_IO_FDS,
    WRITE_MULTI_ENTRY,
    WRITE_MULTI_REPLY,
    Command,
    DmaMapFlags,
    DmaUnmapFlags,
    IoFdType,
    IrqSetFlags,
    RegionFlags,
)
from vfiouser_virtio.turns import SLICE
from vfiouser_virtio.vfio_device import AnswerLater, Buffer, Hold, IoEventFd, PciRegion, RegionInfo, VfioDevice
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import MAX_DATA_XFER_SIZE, MAX_MSG_FDS, Message, name_of

_ADDRESS_SPACE = 1 << 64
WRITES_AT_ONCE = 32
"""Writes of one REGION_WRITE_MULTI after which others may have their turns; fewer where they take long."""

_CONFIG = int(PciRegion.CONFIG)
# Plain ints: the complement of an IntFlag has only the bits that have a name.
_DMA_MAP_FLAGS = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
_DMA_UNMAP_ALL = int(DmaUnmapFlags.ALL)

_DMA_MAP = codec(DMA_MAP)
_DMA_UNMAP = codec(DMA_UNMAP)
_DEVICE_INFO = codec(DEVICE_INFO)
_REGION_INFO = codec(REGION_INFO)
_INFO_CAP_HEADER = codec(INFO_CAP_HEADER)
_REGION_IO_FDS = codec(REGION_IO_FDS)
_IOEVENTFD = codec(IOEVENTFD)
_IRQ_INFO = codec(IRQ_INFO)
_IRQ_SET = codec(IRQ_SET)
_WRITE_MULTI_ENTRY = codec(WRITE_MULTI_ENTRY)
_WRITE_MULTI_COUNT = codec(WRITE_MULTI_REPLY)


class Response(NamedTuple):
    """Reply: its payload, fds to send copies of, and what must end before it is sent.

    ``work`` is what is still to be done for the request, step by step; what it raises is the answer then. A step may
    end with a hold to be waited for before the next. ``late`` gives the rest of the payload, when all that has ended.
    """

    payload: bytes = b""
    fds: Sequence[int] = ()
    hold: Hold | None = None
    work: Iterable[Hold | None] = ()
    late: Callable[[], bytes] | None = None


Handler = Callable[[VfioDevice, Message, Negotiated], Response]


def dispatch(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    """Carry out one request after VERSION.

    Raises PeerError with the errno for the client; anything else that the device raises passes through. The
    message's fds have been given to the device or closed when this returns or raises.
    """
    try:
        if message.fds_lost:
            raise _refused(message, "not all of its file descriptors arrived", errno.EMFILE)
        if len(message.fds) > MAX_MSG_FDS:
            raise _refused(message, f"{len(message.fds):#x} file descriptors, at most {MAX_MSG_FDS:#x} are taken")
        handler = _HANDLERS.get(message.command)
        if handler is None:
            raise _refused(message, "unknown", errno.ENOSYS)
        if message.fds and CLOSER.waiting >= MOST_LEFT_OPEN:
            # By a client that mounts a FUSE of its own, and lets it hang.
            what = f"{name_of(message.command)}: {CLOSER.waiting} files of clients cannot be closed: their servers hang"
            raise PeerError(what, errno.EMFILE, fatal=True)
        return handler(device, message, negotiated)
    finally:
        if message.fds:  # those that the device has not taken
            close_all(message.take_fds())


def check_region_data(data: Buffer, count: int) -> None:
    """Check what a device returned from `region_read`: a wrong length is its bug, not the client's."""
    if len(data) != count:
        raise AssertionError(f"region_read returned {len(data):#x} bytes instead of {count:#x}")


def late_access(offset: int, region: int, asked: int, count: int, later: AnswerLater) -> Response:
    """Answer to an access of ``asked`` bytes that the device wants to be sent later, with ``count`` bytes of data."""

    later.kept()

    def rest() -> bytes:
        data = later.data
        check_region_data(data, count)
        return bytes(data)

    return Response(REGION_ACCESS_CODEC.pack(offset, region, asked), hold=later.hold, late=rest)


def _refused(message: Message, why: str, number: int = errno.EINVAL) -> PeerError:
    return PeerError(f"{name_of(message.command)}: {why}", number)


def _fields(layout: struct.Struct, message: Message) -> tuple[Any, ...]:
    """The fixed part of the payload, which may be longer (SPDK sends 4 KiB for 32 bytes)."""
    if len(message.body) < layout.size:
        raise _refused(message, f"payload of {len(message.body):#x} bytes, {layout.size:#x} expected")
    return layout.unpack_from(message.body)


def _check_argsz(message: Message, argsz: int, minimum: int) -> None:
    if argsz < minimum:
        raise _refused(message, f"argsz {argsz:#x} is below {minimum:#x}")


def _check_range(message: Message, address: int, size: int) -> None:
    if size == 0 or address + size > _ADDRESS_SPACE:
        raise _refused(message, f"address {address:#x} size {size:#x} is not a range")


def _dma_map(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    argsz, flags, offset, address, size = _fields(_DMA_MAP, message)
    _check_argsz(message, argsz, _DMA_MAP.size)
    _check_range(message, address, size)
    if flags & ~_DMA_MAP_FLAGS:
        raise _refused(message, f"flags {flags:#x} has unknown bits")
    if offset + size > 1 << 63:  # off_t
        raise _refused(message, f"offset {offset:#x} size {size:#x} is beyond the end of any file")
    if len(message.fds) > 1:
        raise _refused(message, f"{len(message.fds)} file descriptors, at most one expected")
    device.dma_map(
        address,
        size,
        readable=bool(flags & DmaMapFlags.READ),
        writable=bool(flags & DmaMapFlags.WRITE),
        fd=message.fds.pop() if message.fds else None,
        offset=offset,
    )
    return Response()


def _dma_unmap(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    argsz, flags, address, size = _fields(_DMA_UNMAP, message)
    if flags & DmaUnmapFlags.GET_DIRTY_BITMAP:
        raise _refused(message, f"flags {flags:#x} asks for a dirty bitmap", errno.EOPNOTSUPP)
    if flags & ~_DMA_UNMAP_ALL:
        raise _refused(message, f"flags {flags:#x} has unknown bits")
    # rust-vmm waits for the 24 bytes, QEMU takes them or leaves them.
    echo = bytes(message.body[: _DMA_UNMAP.size]) if argsz >= _DMA_UNMAP.size else b""
    if flags & _DMA_UNMAP_ALL:
        if address or size:
            raise _refused(message, f"flags {flags:#x} (ALL) with address {address:#x} size {size:#x}")
        size = _ADDRESS_SPACE
    _check_range(message, address, size)
    return Response(echo, hold=device.dma_unmap(address, size))


def _device_get_info(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    argsz, *_rest = _fields(_DEVICE_INFO, message)
    _check_argsz(message, argsz, _DEVICE_INFO.size)
    info = device.device_info()
    return Response(_DEVICE_INFO.pack(_DEVICE_INFO.size, info.flags, info.num_regions, info.num_irqs))


def _device_get_region_info(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    argsz, _flags, index, *_rest = _fields(_REGION_INFO, message)
    _check_argsz(message, argsz, _REGION_INFO.size)
    info = device.region_info(index)
    if info.fds and not negotiated.max_msg_fds:  # a client that takes no fds cannot map
        info = RegionInfo(info.flags & ~RegionFlags.MMAP, info.size)
    capabilities = _region_capabilities(info)
    needed = _REGION_INFO.size + len(capabilities)
    # A client with too small an argsz gets the fixed part and asks again. The fds come both times: it closes the first.
    payload = _REGION_INFO.pack(
        needed,
        info.flags | RegionFlags.CAPS if capabilities else info.flags,
        index,
        _REGION_INFO.size if capabilities else 0,
        info.size,
        info.offset,
    )
    if needed <= argsz:
        payload += capabilities
    return Response(payload, info.fds[: negotiated.max_msg_fds])


def _region_capabilities(info: RegionInfo) -> bytes:
    """The chain of ``vfio_info_cap_header``s as it follows the fixed part of the reply."""
    chain = b""
    for number, (identity, version, body) in enumerate(info.capabilities, 1):
        padding = bytes(-len(body) % 8)  # headers and areas have 64-bit fields
        end = len(chain) + _INFO_CAP_HEADER.size + len(body) + len(padding)
        following = _REGION_INFO.size + end if number < len(info.capabilities) else 0
        chain += _INFO_CAP_HEADER.pack(identity, version, following) + body + padding
    return chain


def _device_get_region_io_fds(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    argsz, flags, index, _count = _fields(_REGION_IO_FDS, message)
    _check_argsz(message, argsz, _REGION_IO_FDS.size)
    if flags:
        raise _refused(message, f"flags {flags:#x} is not 0")
    sub_regions: list[IoEventFd] = []
    fds: list[int] = []
    for sub_region in device.io_fds(index):
        if sub_region.fd not in fds:
            if len(fds) == negotiated.max_msg_fds:
                continue  # writes there stay messages
            fds.append(sub_region.fd)
        sub_regions.append(sub_region)
    needed = _REGION_IO_FDS.size + len(sub_regions) * _IOEVENTFD.size
    if needed > argsz:
        return Response(_REGION_IO_FDS.pack(needed, 0, index, 0))
    payload = _REGION_IO_FDS.pack(needed, 0, index, len(sub_regions)) + b"".join(
        _IOEVENTFD.pack(sub.offset, sub.size, fds.index(sub.fd), IoFdType.IOEVENTFD, sub.flags, sub.datamatch)
        for sub in sub_regions
    )
    return Response(payload, fds)


def _device_get_irq_info(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    argsz, _flags, index, _count = _fields(_IRQ_INFO, message)
    _check_argsz(message, argsz, _IRQ_INFO.size)
    info = device.irq_info(index)
    return Response(_IRQ_INFO.pack(_IRQ_INFO.size, info.flags, index, info.count))


def _device_set_irqs(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    argsz, flags, index, start, count = _fields(_IRQ_SET, message)
    _check_argsz(message, argsz, _IRQ_SET.size)
    data = message.body[_IRQ_SET.size : _IRQ_SET.size + count] if flags & IrqSetFlags.DATA_BOOL else b""
    # Fds of a message that has no use for them are closed with it.
    fds = message.fds if flags & IrqSetFlags.DATA_EVENTFD else []
    check_irq_set(device.irq_info(index).count, index, flags, start, count, data, fds)
    device.set_irqs(index, IrqSetFlags(flags), start, count, data, message.take_fds() if fds else [])
    return Response()


def _check_count(message: Message, offset: int, count: int) -> None:
    if not 0 < count <= MAX_DATA_XFER_SIZE or offset + count > _ADDRESS_SPACE:
        raise _refused(message, f"offset {offset:#x} count {count:#x}; 1 to {MAX_DATA_XFER_SIZE:#x} bytes are allowed")


def _region_read(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    offset, region, count = _fields(REGION_ACCESS_CODEC, message)
    _check_count(message, offset, count)
    try:
        data = device.region_read(region, offset, count)
    except AnswerLater as later:
        return late_access(offset, region, count, count, later)
    check_region_data(data, count)
    return Response(REGION_ACCESS_CODEC.pack(offset, region, count) + data)


def _region_write(device: VfioDevice, message: Message, _: Negotiated) -> Response:
    offset, region, count = _fields(REGION_ACCESS_CODEC, message)
    _check_count(message, offset, count)
    data = memoryview(message.body)[REGION_ACCESS_CODEC.size :][:count]
    if len(data) != count:
        raise _refused(message, f"{len(data):#x} bytes of data for count {count:#x}")
    try:
        device.region_write(region, offset, data)
    except AnswerLater as later:
        return late_access(offset, region, count, 0, later)
    return Response(REGION_ACCESS_CODEC.pack(offset, region, count))


def _region_write_multi(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    """All writes are carried out, as if each had come alone; the first one that fails decides the answer."""
    if not negotiated.write_multiple:
        raise _refused(message, "not negotiated", errno.EOPNOTSUPP)
    (count,) = _fields(_WRITE_MULTI_COUNT, message)
    entries = memoryview(message.body)[_WRITE_MULTI_COUNT.size :]
    if count * _WRITE_MULTI_ENTRY.size > len(entries):
        raise _refused(message, f"{len(entries):#x} bytes of data for {count:#x} writes")
    # 43,000 of them fit into a message, and would hold up all devices for a second. The body is lost meanwhile.
    work = _write_multi(device, message, bytes(entries[: count * _WRITE_MULTI_ENTRY.size]))
    for hold in work:
        return Response(_WRITE_MULTI_COUNT.pack(count), hold=hold, work=work)
    return Response(_WRITE_MULTI_COUNT.pack(count))


def _write_multi(device: VfioDevice, message: Message, entries: bytes) -> Iterator[Hold | None]:
    """Check all writes, then carry them out in steps of `WRITES_AT_ONCE`."""
    for index, (offset, _region, size, data) in enumerate(_WRITE_MULTI_ENTRY.iter_unpack(entries), 1):
        if not 0 < size <= len(data) or offset + size > _ADDRESS_SPACE:
            raise _refused(message, f"a write of {size:#x} bytes at {offset:#x}; 1 to 8 bytes are allowed")
        if not index % (8 * WRITES_AT_ONCE):
            yield None
    refused: PeerError | None = None
    due = perf_counter() + SLICE
    for index, (offset, region, size, data) in enumerate(_WRITE_MULTI_ENTRY.iter_unpack(entries), 1):
        try:
            device.region_write(region, offset, data[:size])
        except PeerError as error:
            refused = refused or error
        except AnswerLater as later:
            yield later.hold
        # Config space may reset the function; so may other registers, or all queues of a device.
        if region == _CONFIG or not index % WRITES_AT_ONCE or perf_counter() > due:
            yield None
            due = perf_counter() + SLICE
    try:
        if refused is not None:
            raise refused
    finally:
        del refused  # else it and this frame keep each other


def _device_reset(device: VfioDevice, _message: Message, _: Negotiated) -> Response:
    return Response(hold=device.reset())


def _never(number: int, why: str) -> Handler:
    def refuse(_device: VfioDevice, message: Message, _: Negotiated) -> Response:
        raise _refused(message, why, number)

    return refuse


_HANDLERS: dict[int, Handler] = {
    Command.VERSION: _never(errno.EINVAL, "a second time"),
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _device_get_info,
    Command.DEVICE_GET_REGION_INFO: _device_get_region_info,
    Command.DEVICE_GET_REGION_IO_FDS: _device_get_region_io_fds,
    Command.DEVICE_GET_IRQ_INFO: _device_get_irq_info,
    Command.DEVICE_SET_IRQS: _device_set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.DMA_READ: _never(errno.EINVAL, "only a server asks for it"),
    Command.DMA_WRITE: _never(errno.EINVAL, "only a server asks for it"),
    Command.DEVICE_RESET: _device_reset,
    Command.DIRTY_PAGES: _never(errno.EOPNOTSUPP, "dirty page logging is not supported"),
    Command.REGION_WRITE_MULTI: _region_write_multi,
    Command.DEVICE_FEATURE: _never(errno.ENOTTY, "the device has no such feature"),
    Command.MIG_DATA_READ: _never(errno.EOPNOTSUPP, "migration is not supported"),
    Command.MIG_DATA_WRITE: _never(errno.EOPNOTSUPP, "migration is not supported"),
}
