"""Split and packed virtqueues (virtio 1.4, 2.7 and 2.8), and notifications with data (2.9); names of virtio_ring.h."""

from enum import IntEnum, IntFlag

from construct import Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec

# The largest queue that a driver can set up ("Queue Size", 2.7).
MAX_QUEUE_SIZE = 32768


class DescFlags(IntFlag):
    """``flags`` of a descriptor (2.7.5, 2.8.1); a split ring has only the first three."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15


class AvailFlags(IntFlag):
    """``flags`` of the available ring (2.7.6)."""

    NO_INTERRUPT = 1


class UsedFlags(IntFlag):
    """``flags`` of the used ring (2.7.8)."""

    NO_NOTIFY = 1


class RingEventFlags(IntEnum):
    """``flags`` of a packed ring's event suppression structures (2.8.10); 3 is reserved."""

    ENABLE = 0
    DISABLE = 1
    DESC = 2
    """Notify when the descriptor of ``off_wrap`` is passed; only with EVENT_IDX."""


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


# ---- packed (2.8) ------------------------------------------------------------------------------------------------

PACKED_DESC = Struct("addr" / Int64ul, "len" / Int32ul, "id" / Int16ul, "flags" / Int16ul)
# struct pvirtq_event_suppress (2.8.14): off_wrap is a descriptor's index, and in bit 15 a wrap counter.
PACKED_EVENT = Struct("off_wrap" / Int16ul, "flags" / Int16ul)

PACKED_DESC_CODEC = codec(PACKED_DESC)
WRAP_COUNTER = 1 << 15

# Alignment of the descriptor ring and of the two event suppression structures ("Packed Virtqueues", 2.8).
PACKED_DESC_ALIGN, PACKED_EVENT_ALIGN = 16, 4
PACKED_EVENT_SIZE = PACKED_EVENT.sizeof()


def packed_desc_size(size: int) -> int:
    """Bytes of the descriptor ring of a packed queue of ``size`` entries, any number from 1 to `MAX_QUEUE_SIZE`."""
    return PACKED_DESC_CODEC.size * size


# ---- notifications with data (2.9) -------------------------------------------------------------------------------

# NOTIFICATION_DATA: the queue's index (with NOTIF_CONFIG_DATA what queue_notif_config_data says), and the next
# available index of a split ring, or descriptor index and wrap counter (bit 15) of a packed one.
NOTIFICATION_DATA = Struct("vq_index" / Int16ul, "next" / Int16ul)
NOTIFICATION_DATA_CODEC = codec(NOTIFICATION_DATA)
