"""Bridge between a served PCI device and a simulator of its logic: messages on a UNIX stream socket, little-endian.

::

    simulator                                   bridge (the served device)
        HELLO  magic, version          ──▶                                       first, once
               ◀──  reply: version, identity, BARs, interrupts
               ◀──  READ, WRITE, RESET                                           in order; answered in order
        reply: data, or nothing        ──▶
        DMA_READ, DMA_WRITE            ──▶                                       answered in order
               ◀──  reply: data, or nothing
        INTERRUPT                      ──▶                                       no reply
        END                           ◀──▶                                       no reply; then the socket is closed

Each message is a `HEADER` and a body. A reply has the ``kind`` and the ``id`` of its request, the bit `REPLY`, and a
`RtlStatus`; its body is empty unless that is OK. ``docs/rtl-bridge.md`` has what each end may expect of the other.
"""

from enum import IntEnum

from construct import Array, Bytes, Int16ul, Int32ul, Int64ul, Padding, Struct

from vfiouser_virtio.protocols.codec import codec

MAGIC = b"vfio-rtl"
VERSION = 1
"""Raised with each change that an older end would not understand; both ends must have the same."""
REPLY = 0x8000
"""Bit of ``kind``."""
MAX_ACCESS = 8
"""Bytes of a READ or WRITE: 1, 2, 4 or 8, at a multiple of that."""
MAX_DMA = 64 << 10
"""Bytes of a DMA_READ or DMA_WRITE, at least 1."""
MAX_REASON = 256
"""Bytes of the body of END: why, in UTF-8."""


class RtlMessage(IntEnum):
    """Kinds of messages."""

    HELLO = 1
    """Body `HELLO`; of the reply `DESCRIPTION`."""
    READ = 2
    """Body `ACCESS`; of the reply ``count`` bytes."""
    WRITE = 3
    """Body `ACCESS` and ``count`` bytes; of the reply none."""
    RESET = 4
    """No body: all of the design but what survives a function level reset. All before its reply is void."""
    DMA_READ = 5
    """Body `DMA`; of the reply ``count`` bytes."""
    DMA_WRITE = 6
    """Body `DMA` and ``count`` bytes; of the reply none: they are in memory then."""
    INTERRUPT = 7
    """Body `INTERRUPT`."""
    END = 8
    """Body `MAX_REASON` bytes of text at most."""


class RtlStatus(IntEnum):
    """Outcome of a request."""

    OK = 0
    REFUSED = 1
    """DMA: the driver has not turned Bus Master on, or there is no such memory. Registers: there are none (DECERR)."""
    RESET = 2
    """The function has been reset meanwhile."""
    FAILED = 3
    """The other end could not."""


class InterruptAction(IntEnum):
    """Change of an interrupt."""

    LOWER = 0
    """A level: there is no cause for it any more."""
    RAISE = 1
    """A level: there is a cause for it."""
    TRIGGER = 2
    """An event: one message, or INTx until `LOWER`."""


HEADER = Struct("size" / Int32ul, "kind" / Int16ul, "status" / Int16ul, "id" / Int32ul, Padding(4))
"""``size`` is that of the whole message, in bytes. ``id`` is chosen by whoever asks."""
HELLO = Struct("magic" / Bytes(len(MAGIC)), "version" / Int32ul)
DESCRIPTION = Struct(
    "version" / Int32ul,
    "vendor" / Int16ul,
    "device" / Int16ul,
    "subsystem_vendor" / Int16ul,
    "subsystem" / Int16ul,
    "class_code" / Int32ul,
    "interrupts" / Int32ul,
    "bar_sizes" / Array(6, Int64ul),
)
"""What the guest sees; a BAR of 0 bytes is absent."""
ACCESS = Struct("bar" / Int32ul, "count" / Int32ul, "offset" / Int64ul)
DMA = Struct("address" / Int64ul, "count" / Int32ul, Padding(4))
INTERRUPT = Struct("vector" / Int32ul, "action" / Int32ul)

HEADER_CODEC = codec(HEADER)
HELLO_CODEC = codec(HELLO)
DESCRIPTION_CODEC = codec(DESCRIPTION)
ACCESS_CODEC = codec(ACCESS)
DMA_CODEC = codec(DMA)
INTERRUPT_CODEC = codec(INTERRUPT)

MAX_MESSAGE = HEADER_CODEC.size + DMA_CODEC.size + MAX_DMA
"""Bytes of the longest message."""


def pack_message(kind: int, number: int, body: bytes = b"", status: int = RtlStatus.OK) -> bytes:
    """The bytes of a message with this id."""
    return HEADER_CODEC.pack(HEADER_CODEC.size + len(body), kind, status, number) + body
