"""Mappings of a client, many in one message: how the next process of a device is told of those that there are.

The command is the keeper's own, and not one of vfio-user: no client's is handed on. A DMA_MAP each would take 120 µs of
CPU time, most of it for the message, its answer and a file descriptor, and behind a vIOMMU a guest has thousands.

::

    payload    mapping, mapping, …: the payload of its DMA_MAP, then which of the file descriptors is its, or none
    answer     without payload; an error is that of the first mapping that could not be made
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import construct as c

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import CLOSER, MOST_LEFT_OPEN, close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, DmaMapFlags
from vfiouser_virtio.vfio_device import Hold, VfioDevice
from vfiouser_virtio.vfio_user.server.dispatch import Response, dispatch
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message

MAPPINGS = 0xFF00
"""The command."""
MOST_MAPPINGS, MOST_FILES = 1024, 64
"""Of one message: 36 KiB, of which some are on their way at once; unix(7) allows for 253 file descriptors."""
# Mappings between two looks at the clock; each takes some 30 µs.
_AT_ONCE = 32
_NO_FILE = -1

MAPPING = c.Struct("dma_map" / DMA_MAP, "file" / c.Int32sl)
_MAPPING = codec(MAPPING)
_FILE = struct.Struct("<i")


class Mappings(NamedTuple):
    """Payload and file descriptors of one message."""

    payload: bytes
    fds: list[int]


def messages(mappings: Iterable[tuple[bytes, int]]) -> Iterator[Mappings]:
    """The messages that tell of ``mappings``: of each the payload of its DMA_MAP, and its file descriptor or -1."""
    parts: list[bytes] = []
    files: dict[int, int] = {}
    for payload, fd in mappings:
        if len(parts) == 2 * MOST_MAPPINGS or (len(files) == MOST_FILES and fd >= 0 and fd not in files):
            yield Mappings(b"".join(parts), [*files])
            parts, files = [], {}
        parts += payload, _FILE.pack(_NO_FILE if fd < 0 else files.setdefault(fd, len(files)))
    if parts:
        yield Mappings(b"".join(parts), [*files])


def dispatch_with_mappings(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    """As `dispatch`, in a process that a keeper has started."""
    if message.command != MAPPINGS:
        return dispatch(device, message, negotiated)
    fds = message.take_fds()
    work = _map_all(device, bytes(message.body), fds)  # the body is lost meanwhile
    for hold in work:  # the first step, so that whatever follows the file descriptors are closed
        return Response(hold=hold, work=work)
    return Response()


def _map_all(device: VfioDevice, payload: bytes, fds: list[int]) -> Iterator[Hold | None]:
    """Make the mappings, with turns for others in between; those that cannot be made do not keep the others away."""
    refused: PeerError | None = None
    try:
        for number, (_argsz, flags, offset, address, size, place) in enumerate(_MAPPING.iter_unpack(payload), 1):
            try:
                fd = None if place == _NO_FILE else _copy(fds, place, (address, size))
                device.dma_map(
                    address,
                    size,
                    readable=bool(flags & DmaMapFlags.READ),
                    writable=bool(flags & DmaMapFlags.WRITE),
                    fd=fd,
                    offset=offset,
                )
            except PeerError as error:
                refused = refused or error
            if not number % _AT_ONCE:
                yield None
    finally:
        close_all(fds)
    try:
        if refused is not None:
            raise refused
    finally:
        del refused  # else it and this frame keep each other


def _copy(fds: list[int], place: int, mapping: tuple[int, int]) -> int:
    # Each copy of one whose file system hangs stays open when it is mapped, and a client may have it in all mappings.
    if CLOSER.waiting < MOST_LEFT_OPEN:
        try:
            return os.dup(fds[place])
        except (IndexError, OSError):
            pass  # not all have arrived, or there is no room for a copy
    address, size = mapping
    raise PeerError(f"DMA_MAP of {address:#x}+{size:#x}: no room for its file descriptor", errno.EMFILE)
