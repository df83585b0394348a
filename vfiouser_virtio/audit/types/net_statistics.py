"""Watch of how a driver asks for device statistics (virtio 1.4, 5.1.9.5.11)."""

from vfiouser_virtio.audit.chains import SeenChain, look
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio.net import (
    QUEUE_STATS,
    STATS,
    STATS_CAPABILITIES,
    STATS_REPLY_HDR,
    Ack,
    CtrlStats,
    StatsType,
)
from vfiouser_virtio.virtio import DeviceCore
from vfiouser_virtio.vring.descriptors import Memory

_STATISTICS = "5.1.9.5.11.13 Device Statistics"

QUERIED = must(
    "net/stats-queried",
    _STATISTICS,
    "types_bitmap has only types that the device has told of in answer to QUERY.",
    "each GET, and what the answers to QUERY were since the device was made",
)
QUEUE = must(
    "net/stats-queue",
    _STATISTICS,
    "types_bitmap has only types that the queue vq_index has.",
    "each GET: types of receive, transmit and control queues",
)
ROOM = must(
    "net/stats-room",
    _STATISTICS,
    "The result of GET has room for the headers of all replies.",
    "the writable bytes of each GET, whatever the order of the replies",
)

_QUEUE_STATS, _CAPABILITIES = codec(QUEUE_STATS), codec(STATS_CAPABILITIES)
_HDR = codec(STATS_REPLY_HDR).size
_VALUES = {kind: codec(schema).size for kind, schema in STATS.items()}
_ACK = 1
_RECEIVE = sum(1 << kind for kind in range(StatsType.TX_BASIC))
_TRANSMIT = sum(1 << kind for kind in range(StatsType.TX_BASIC, StatsType.CVQ))
_CONTROL = ((1 << 64) - 1) & ~(_RECEIVE | _TRANSMIT)
_MAX_QUERIES = 64
"""Commands QUERY in flight that are kept in mind: a control queue of ours has so many entries."""


def _pieces(chain: SeenChain) -> list[tuple[int, int]]:
    """Where the device writes the answer to QUERY, and no more: a driver can have a chain of many thousand pieces."""
    pieces, left = [], _ACK + _CAPABILITIES.size
    for address, length in chain.writable:
        if length and left:
            pieces.append((address, min(length, left)))
            left -= pieces[-1][1]
    return pieces


class StatisticsWatch(RequestWatch):
    """Watch of the commands QUERY and GET."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._queries: dict[int, tuple[Memory, list[tuple[int, int]]]] = {}
        """Head to where the answer will be, of each QUERY in flight."""
        self._told: int | None = 0
        """Types that the device has told of; None: an answer could not be looked at. A reset does not change them."""

    def reset(self) -> None:
        """Nothing is in flight."""
        self._queries.clear()

    def command(self, command: int, data: bytes, chain: SeenChain, control: int) -> None:
        """One of class STATS; the control queue has the index ``control``."""
        if command == CtrlStats.QUERY:
            if len(self._queries) < _MAX_QUERIES:
                self._queries[chain.head] = chain.memory, _pieces(chain)
            else:
                self._told = None
        elif command == CtrlStats.GET:
            self._get(data, chain, control)

    def used(self, queue: int, head: int) -> None:
        """The device has answered, perhaps a QUERY."""
        del queue
        if head not in self._queries:
            return
        memory, pieces = self._queries.pop(head)
        answer = b""
        for address, length in pieces:
            piece = look(memory, address, length)
            if piece is None or self._told is None:
                self._told = None
                return
            answer += piece
        if len(answer) == _ACK + _CAPABILITIES.size and answer[0] == Ack.OK:
            self._told |= _CAPABILITIES.unpack_from(answer, _ACK)[0]

    def _get(self, data: bytes, chain: SeenChain, control: int) -> None:
        sizes: list[int] = []
        for index, _, types in _QUEUE_STATS.iter_unpack(data[: len(data) // _QUEUE_STATS.size * _QUEUE_STATS.size]):
            seen = f"GET of types {types:#x} of queue {index:#x}"
            if self._told is not None and types & ~self._told:
                self.broke(QUERIED, f"{seen}; the device has told of {self._told:#x}")
            there = _CONTROL if index == control else _TRANSMIT if index % 2 else _RECEIVE
            if index > control or types & ~there:
                self.broke(QUEUE, f"{seen}; the control queue is {control:#x}")
            sizes += [size for kind, size in _VALUES.items() if types >> kind & 1]
        # The device chooses the order: behind the last header there may be the longest statistics.
        least = _ACK + _HDR * len(sizes) + sum(sizes) - max(sizes, default=0)
        if chain.in_length < least:
            self.broke(ROOM, f"GET with {len(sizes):#x} replies and room for {chain.in_length:#x} of {least:#x} bytes")
