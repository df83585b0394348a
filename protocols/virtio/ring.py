"""Split virtqueues (virtio 1.4, 2.7): descriptor table, available ring, used ring; names of linux/virtio_ring.h."""

from enum import IntFlag

from construct import Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec

# The largest queue that a driver can set up ("Queue Size", 2.7).
MAX_QUEUE_SIZE = 32768


class DescFlags(IntFlag):
    """``flags`` of a descriptor (2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class AvailFlags(IntFlag):
    """``flags`` of the available ring (2.7.6)."""

    NO_INTERRUPT = 1


class UsedFlags(IntFlag):
    """``flags`` of the used ring (2.7.8)."""

    NO_NOTIFY = 1


DESC = Struct("addr" / Int64ul, "len" / Int32ul, "flags" / Int16ul, "next" / Int16ul)
USED_ELEM = Struct("id" / Int32ul, "len" / Int32ul)
# What stands before the rings' entries; after them comes one more 16-bit word, used_event and avail_event.
AVAIL = Struct("flags" / Int16ul, "idx" / Int16ul)
USED = Struct("flags" / Int16ul, "idx" / Int16ul)

DESC_CODEC = codec(DESC)
USED_ELEM_CODEC = codec(USED_ELEM)

# Alignment of the three parts ("Split Virtqueues", 2.7).
DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4


def desc_size(size: int) -> int:
    """Bytes of the descriptor table of a queue of ``size`` entries."""
    return DESC_CODEC.size * size


def avail_size(size: int) -> int:
    """Bytes of the available ring, used_event included."""
    return 6 + 2 * size


def used_size(size: int) -> int:
    """Bytes of the used ring, avail_event included."""
    return 6 + USED_ELEM_CODEC.size * size
