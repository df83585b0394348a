"""Ethernet frame with its offload header, as network devices and back ends hand it on.

The offload header says what the sender has left to do: a checksum that is to be completed, a packet that is to be cut
into segments. It is struct virtio_net_hdr without what belongs to one ring (num_buffers, the hash).
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

IOV_MAX = 1024
"""Pieces that one system call takes (UIO_MAXIOV of Linux); a frame of a guest can have more."""


class Offload(NamedTuple):
    """Work that is left to be done (virtio 1.4, 5.1.9.2): checksum, segmentation. Offsets are from the frame's start.

    Its numbers come from a driver or a peer, and may lie: see `offload.check`.
    """

    flags: int
    """``VIRTIO_NET_HDR_F_*``."""
    gso_type: int
    """``VIRTIO_NET_HDR_GSO_*``."""
    hdr_len: int
    """Length of all headers in bytes: a hint, never trusted."""
    gso_size: int
    """Bytes of payload of each segment."""
    csum_start: int
    """From where on the checksum is taken, if ``flags`` has NEEDS_CSUM."""
    csum_offset: int
    """Where it is stored, in bytes from ``csum_start``."""
    outer_th_offset: int = 0
    """Where the outer UDP header is, if ``gso_type`` is one of a tunnel; the others are about what is in it then."""
    inner_nh_offset: int = 0
    """Where the inner IP header is, if so."""


class Frame:
    """Ethernet frame, without its checksum (FCS): ``segments`` have ``length`` bytes together.

    The views may be of a guest's memory: they, and the object itself, are valid only until the call that they were
    handed to returns, and the bytes can change meanwhile. What is kept is a `copy`; what is looked at twice is copied.
    """

    __slots__ = ("length", "offload", "segments")

    def __init__(self, segments: Sequence[memoryview], length: int, offload: Offload | None = None) -> None:
        self.segments = segments
        self.length = length
        """Bytes, from the destination address on."""
        self.offload = offload
        """None: the frame is complete as it is, as on a wire."""

    def __repr__(self) -> str:
        return f"<Frame of {self.length:#x} bytes, {self.offload or 'complete'}>"

    def tobytes(self) -> bytes:
        """All of it."""
        segments = self.segments
        return segments[0].tobytes() if len(segments) == 1 else b"".join(segments)

    def for_kernel(self, *header: bytes) -> list[bytes | memoryview]:
        """What sendmsg(2) and writev(2) take: ``header``, then the frame, in one piece where it has too many."""
        if len(self.segments) + len(header) > IOV_MAX:
            return [*header, self.tobytes()]
        return [*header, *self.segments]

    def copy(self) -> "Frame":
        """A frame with memory of its own."""
        return Frame([memoryview(self.tobytes())], self.length, self.offload)

    def head(self, count: int) -> bytes:
        """The first ``count`` bytes, or fewer where there are no more: addresses and protocol headers."""
        first = self.segments[0] if len(self.segments) else memoryview(b"")
        if len(first) >= count:
            return first[:count].tobytes()
        head = b""
        for segment in self.segments:
            head += segment[: count - len(head)]
            if len(head) == count:
                break
        return head


LENGTH = attrgetter("length")
"""The length of a frame: to add up those of many."""


def frame_of(data: bytes | bytearray | memoryview, offload: Offload | None = None) -> Frame:
    """The frame that these bytes are."""
    return Frame([memoryview(data)], len(data), offload)
