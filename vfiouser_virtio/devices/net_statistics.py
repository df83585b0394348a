"""Device statistics of a network device (virtio 1.4, 5.1.9.5.11): how a driver reads the counters of its queues."""

from collections.abc import Callable, Sequence
from typing import Any

from vfiouser_virtio.protocols.codec import codec, offsets
from vfiouser_virtio.protocols.virtio.net import (
    QUEUE_STATS,
    STATS,
    STATS_CAPABILITIES,
    STATS_REPLY_HDR,
    NetFeature,
    StatsType,
)

# Without RX_SPEED and TX_SPEED: nothing is dropped here for the sake of `speed`.
_RX = (StatsType.RX_BASIC, StatsType.RX_CSUM, StatsType.RX_GSO)
_TX = (StatsType.TX_BASIC, StatsType.TX_CSUM, StatsType.TX_GSO)
_CVQ = (StatsType.CVQ,)
# One of these features must have been negotiated.
_NEEDS = {
    StatsType.RX_CSUM: NetFeature.GUEST_CSUM.mask,
    StatsType.RX_GSO: NetFeature.GUEST_TSO4.mask | NetFeature.GUEST_TSO6.mask,
    StatsType.TX_CSUM: NetFeature.CSUM.mask,
    StatsType.TX_GSO: NetFeature.HOST_TSO4.mask | NetFeature.HOST_TSO6.mask | NetFeature.HOST_USO.mask,
}
_REQUEST = codec(QUEUE_STATS)
_REPLY_HDR = codec(STATS_REPLY_HDR)
_VALUES = {kind: (tuple(offsets(schema)), codec(schema)) for kind, schema in STATS.items()}
_WRAP = (1 << 64) - 1

CAPABILITIES = codec(STATS_CAPABILITIES).pack(sum(1 << kind for kind in (*_RX, *_TX, *_CVQ)))
"""The result of QUERY."""

Counter = Callable[[str], int]
"""A queue's counters, by the names of the specification without ``rx_`` and ``tx_``; 0 for what is not counted."""


def counter_of(counters: Any, queue: Any) -> Counter:
    """`Counter` of an object with an attribute for each, and of a `Queue` for its notifications and interrupts."""

    def count(name: str) -> int:
        value: int = getattr(queue if name in ("notifications", "interrupts") else counters, name, 0)
        return value

    return count


def statistics(request: bytes, queues: Sequence[Counter], features: int, room: int) -> bytes:
    """The replies to the data of a command GET, as many whole ones as there is ``room`` for, in bytes.

    ``queues`` are those that there are with the ``features`` that were negotiated, the control queue last. Raises
    ValueError for a request that must fail.
    """
    count, rest = divmod(len(request), _REQUEST.size)
    # Who asks for the same queue again and again would have us answer for as long as there is room.
    if rest or count > len(queues):
        raise ValueError(f"{len(request):#x} bytes, where each of {len(queues)} queues takes {_REQUEST.size:#x}")
    wanted = [
        (kind, index)
        for index, _, types in _REQUEST.iter_unpack(request)
        for kind in _kinds(index, types, queues, features)
    ]
    replies = b""
    for kind, index in wanted:
        names, packer = _VALUES[kind]
        size = _REPLY_HDR.size + packer.size
        if len(replies) + size > room:
            break
        prefix = "" if kind is StatsType.CVQ else f"{kind.name[:2].lower()}_"
        values = [queues[index](name.removeprefix(prefix)) & _WRAP for name in names]
        replies += _REPLY_HDR.pack(kind, 0, index, 0, size) + packer.pack(*values)
    return replies


def _kinds(index: int, types: int, queues: Sequence[Counter], features: int) -> list[StatsType]:
    """What a request wants to know of one queue. Raises ValueError."""
    if index >= len(queues):
        raise ValueError(f"queue {index:#x}, of {len(queues):#x}")
    kinds = _CVQ if index == len(queues) - 1 else _TX if index % 2 else _RX
    wanted = [kind for kind in kinds if types >> kind & 1]
    if types != sum(1 << kind for kind in wanted):
        raise ValueError(f"types {types:#x} of queue {index:#x}, which has {', '.join(kind.name for kind in kinds)}")
    for kind in wanted:
        if not features & _NEEDS.get(kind, -1):
            raise ValueError(f"{kind.name} of queue {index:#x}, without a feature that it needs")
    return wanted
