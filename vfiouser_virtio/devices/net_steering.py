"""Receive steering of a network device (virtio 1.4, 5.1.9.5.5 to 5.1.9.5.7): automatic, RSS, and hash reports.

::

                                      ┌─ automatic: the pair on which the driver has last sent that flow
    frame ──▶ flow ──▶ known? ── no ──┤
                │        │            └─ RSS: Toeplitz hash ──▶ indirection table
                └──── cached ──▶ (pair, hash, kind of hash)

Of two ways to configure it the last command counts (5.1.9.5.5). Pairs are numbered from 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.devices.net_flow import Flow, flow_of, reverse, without_extensions
from vfiouser_virtio.devices.net_toeplitz import Toeplitz
from vfiouser_virtio.protocols.virtio.net import MIN_RSS_TABLE, HashReport, HashType

MAX_TABLE = MIN_RSS_TABLE
"""Entries of an indirection table, ``rss_max_indirection_table_length``."""
HASH_TYPES = int(HashType((1 << 9) - 1))
"""``supported_hash_types``: all of them."""
MAX_FLOWS = 4096
"""Flows that are remembered: a network can have as many as it likes. Those of the driver are two times as many."""

Placement = tuple[int, int, int]
"""Pair, ``hash_value`` and ``hash_report``: both 0 where there is no hash."""
FIRST: Placement = (0, 0, 0)


class RssConfig(NamedTuple):
    """struct virtio_net_rss_config, checked; see `Steering.set_rss`."""

    unclassified: int
    """Pair for what has no hash."""
    table: Sequence[int]
    """Pairs: a power of two of them, `MAX_TABLE` at most."""


class Steering:
    """Choice of the receive queue for each frame. ``max_flows`` bounds what is remembered: see `MAX_FLOWS`."""

    def __init__(self, told: Callable[[int], None] = lambda _pairs: None, *, max_flows: int = MAX_FLOWS) -> None:
        self.told = told
        """Called with the pairs in use when the driver may have changed them."""
        self.pairs = 1
        """Queue pairs in use: the driver may send on so many, and automatic steering uses so many."""
        self.trivial = True
        """All goes to the first queue, without a hash: `steer` need not be asked."""
        self.learns = False
        """`sent` wants to know of what the driver sends."""
        self._max_flows = max_flows
        self._rss: RssConfig | None = None
        self._hash: Toeplitz | None = None
        self._plans: dict[int, tuple[int, slice, slice]] = {}
        self._placed: dict[Flow | None, Placement] = {}
        # On which pair the driver has sent a flow. The older half is dropped when the other one is full.
        self._sent: dict[Flow, int] = {}
        self._sent_before: dict[Flow, int] = {}

    @property
    def flows(self) -> int:
        """Flows that are remembered, and those that were placed: their number has a bound."""
        return len(self._sent) + len(self._sent_before) + len(self._placed)

    def reset(self) -> None:
        """One pair, and no hash."""
        self._rss = None
        self._plans = {}
        self.set_pairs(1)

    def take_over(self, predecessor: "Steering") -> None:
        """What the driver had told that one holds here, and where it has sent."""
        vars(self).update(vars(predecessor) | {"told": self.told})
        self.told(self.pairs)

    def set_pairs(self, pairs: int) -> None:
        """Steer automatically, with so many pairs, from 1 on."""
        self.pairs = pairs
        self._rss = None
        self._begin()

    def set_rss(self, config: RssConfig, types: int, key: bytes, pairs: int) -> None:
        """Steer by hashes; the driver sends on ``pairs`` pairs."""
        self.pairs = pairs
        self._rss = config
        self._set_hash(types, key)

    def set_hash(self, types: int, key: bytes) -> None:
        """Calculate hashes, for reports; what steers is automatic."""
        self._rss = None
        self._set_hash(types, key)

    def _set_hash(self, types: int, key: bytes) -> None:
        if self._hash is None or self._hash.key != key:
            # 0.6 ms, and drivers set all of it again when something else changes.
            self._hash = Toeplitz(key)
        self._plans = _plans(types)
        self._begin()

    def _begin(self) -> None:
        """Whatever was decided is to be decided anew."""
        self._placed = {}
        self._sent, self._sent_before = {}, {}
        self.learns = self._rss is None and self.pairs > 1
        self.trivial = self._rss is None and self.pairs == 1 and not self._plans
        self.told(self.pairs)

    # ---- frames --------------------------------------------------------------------------------------------------

    def steer(self, frame: Frame) -> Placement:
        """Where a frame for the driver goes."""
        if self.trivial:
            return FIRST
        flow = flow_of(frame)
        placement = self._placed.get(flow)
        return self._place(flow) if placement is None else placement

    def move(self, frame: Frame, pair: int) -> bool:
        """Send a frame's flow to that pair: the queue where it goes is being reset. False for RSS, which says where."""
        if self._rss is not None or pair >= self.pairs:
            return False
        flow = flow_of(frame)
        _, value, report = self._placed.get(flow) or self._place(flow)
        if flow not in self._placed and len(self._placed) >= self._max_flows:  # of a kind that `_place` does not keep
            self._placed.clear()
        self._placed[flow] = pair, value, report
        return True

    def sent(self, frame: Frame, pair: int) -> None:
        """The driver has sent this frame on that pair: what comes back is to go there."""
        flow = flow_of(frame)
        if flow is None:
            return
        flow = without_extensions(flow)
        sent = self._sent
        if sent.get(flow) == pair:  # as of nearly every packet: for the others only the flow is reversed
            return
        if len(sent) >= self._max_flows:
            self._sent_before, self._sent = sent, {}
            sent = self._sent
        sent[flow] = pair
        self._placed.pop(reverse(flow), None)

    def _place(self, flow: Flow | None) -> Placement:
        value, report = (0, 0) if flow is None else self._hash_of(flow)
        rss = self._rss
        if rss is not None:
            pair = rss.table[value & len(rss.table) - 1] if report else rss.unclassified
        else:
            pair = 0 if flow is None else self._pair_of(reverse(flow))
        placement = pair, value, report
        if rss is None and flow is not None and flow[0] >= HashReport.IPv6_EX:
            return placement  # not to be found when the driver sends elsewhere
        if len(self._placed) >= self._max_flows:
            self._placed.clear()
        self._placed[flow] = placement
        return placement

    def _pair_of(self, answers: Flow) -> int:
        pair = self._sent.get(answers)
        if pair is None:
            pair = self._sent_before.get(answers)
        # Nothing was sent yet: any queue may be, and the same one for one flow keeps its order.
        return hash(answers) % self.pairs if pair is None or pair >= self.pairs else pair

    def _hash_of(self, flow: Flow) -> tuple[int, int]:
        """Value and kind of a flow's hash; zeros where none is to be calculated."""
        kind, fields = flow
        plan = self._plans.get(kind)
        if plan is None or self._hash is None:
            return 0, 0
        report, first, second = plan
        return self._hash(fields[first] + fields[second]), report


# What is hashed of a flow's fields: two slices of them, by the kind that is reported.
_NOTHING = slice(0)
_INPUT = {
    HashReport.IPv4: (slice(8), _NOTHING),
    HashReport.TCPv4: (slice(12), _NOTHING),
    HashReport.UDPv4: (slice(12), _NOTHING),
    HashReport.IPv6: (slice(32), _NOTHING),
    HashReport.TCPv6: (slice(36), _NOTHING),
    HashReport.UDPv6: (slice(36), _NOTHING),
    HashReport.IPv6_EX: (slice(-32, None), _NOTHING),
    HashReport.TCPv6_EX: (slice(-32, None), slice(32, 36)),
    HashReport.UDPv6_EX: (slice(-32, None), slice(32, 36)),
}
# For each kind of flow the kinds of hashes that it may have, the best one first.
_CANDIDATES = {
    HashReport.IPv4: (HashReport.IPv4,),
    HashReport.TCPv4: (HashReport.TCPv4, HashReport.IPv4),
    HashReport.UDPv4: (HashReport.UDPv4, HashReport.IPv4),
    HashReport.IPv6: (HashReport.IPv6,),
    HashReport.TCPv6: (HashReport.TCPv6, HashReport.IPv6),
    HashReport.UDPv6: (HashReport.UDPv6, HashReport.IPv6),
    HashReport.IPv6_EX: (HashReport.IPv6_EX, HashReport.IPv6),
    HashReport.TCPv6_EX: (HashReport.TCPv6_EX, HashReport.IPv6_EX, HashReport.TCPv6, HashReport.IPv6),
    HashReport.UDPv6_EX: (HashReport.UDPv6_EX, HashReport.IPv6_EX, HashReport.UDPv6, HashReport.IPv6),
}


def _plans(types: int) -> dict[int, tuple[int, slice, slice]]:
    """For each kind of flow what to hash and to report, with these hash types enabled."""
    plans = {}
    for kind, candidates in _CANDIDATES.items():
        for report in candidates:
            if types >> report - 1 & 1:
                plans[int(kind)] = (int(report), *_INPUT[report])
                break
    return plans
