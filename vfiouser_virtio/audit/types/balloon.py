"""Watch of a balloon's queues (virtio 1.4, 5.5.6)."""

from collections import Counter

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.protocols.virtio.balloon import PFN_CODEC, STAT_CODEC, BalloonFeature, CommandId
from vfiouser_virtio.virtio import DeviceCore

_STATS, _HINT = "5.5.6.3.1 Memory Statistics", "5.5.6.5.1 Free Page Hinting"

UNACKNOWLEDGED = must(
    "balloon/deflate-early",
    "5.5.6.1 Device Operation",
    "No page is deflated before the device has acknowledged that it was inflated.",
    "pages in deflateq that are in a buffer of inflateq in flight",
)
ONE = must("balloon/stats-one", _STATS, "statsq has one buffer at most.", "buffers of statsq in flight")
SAME = must(
    "balloon/stats-same",
    _STATS,
    "All buffers of statsq have the same subset of statistics.",
    "the tags of each buffer of statsq, and of the one before",
)
HINT_SIZE = must("balloon/hint-size", _HINT, "Output buffers of free_page_vq have 4 bytes.", "buffers of that queue")
HINT_START = must(
    "balloon/hint-start",
    _HINT,
    "Hinting begins with an output buffer that has the command id.",
    "input buffers of free_page_vq with no id in an output buffer since the device's reset, or since STOP",
)
HINT_ONCE = must(
    "balloon/hint-once",
    _HINT,
    "A command id is provided in one output buffer at most.",
    "ids, but for STOP, since the device's reset: the same twice in a row",
)


_MOST_OF_ONE = 256 * PFN_CODEC.size
"""Bytes of one buffer that are looked at; Linux gives 256 pages at most. 60 buffers of 16384 took 90 ms in one go."""
_MAX_PAGES = 1 << 17
"""Pages in flight that are kept in mind: a guest has that of a queue of buffers of 16384 pages, and the watch a hundred
bytes for each. Of the others it is not judged whether they are deflated."""


def _pages(raw: bytes) -> set[int]:
    """Page numbers of a buffer; what is behind the last whole one is none."""
    return {page for (page,) in PFN_CODEC.iter_unpack(raw[: len(raw) // PFN_CODEC.size * PFN_CODEC.size])}


class BalloonWatch(RequestWatch):
    """Watch of all queues. Those of features that were not accepted do not exist: the numbers are of those that do."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._inflating: dict[int, bytes] = {}
        """Head to the page numbers of each buffer in flight, as the driver has written them."""
        self._pages: Counter[int] = Counter()
        """In how many of these buffers a page is."""
        self._stats: set[int] = set()
        self._tags: list[int] | None = None
        self._command: int | None = None
        self._hinting = False

    def reset(self) -> None:
        """Nothing is in flight."""
        self.queue_reset(0)
        self.queue_reset(2)
        self._tags = self._command = None
        self._hinting = False

    def queue_reset(self, queue: int) -> None:
        """The buffers of the queue are the driver's again."""
        if queue == 0:
            self._inflating.clear()
            self._pages.clear()
        elif queue == 2:
            self._stats.clear()

    def available(self, chain: SeenChain) -> None:
        """By queue."""
        raw = chain.peek(_MOST_OF_ONE)
        if chain.queue in (0, 1):
            # One look-up for each page: buffers of 16384 pages, each held against each other one, would take minutes.
            if chain.queue == 0:
                pages = _pages(raw)
                if len(self._pages) + len(pages) <= _MAX_PAGES:
                    self.used(0, chain.head)
                    self._inflating[chain.head] = raw
                    self._pages.update(pages)
            elif (early := next((page for page in _pages(raw) if page in self._pages), None)) is not None:
                self.broke(UNACKNOWLEDGED, f"deflates page {early:#x}, which is being inflated")
        elif chain.queue == 2 and self.accepted(BalloonFeature.STATS_VQ):
            self._statistics(chain, raw)
        elif chain.queue == 3 and self.accepted(BalloonFeature.FREE_PAGE_HINT):
            if chain.readable:
                self._hint(chain, raw)
            elif chain.writable and not self._hinting:
                self.broke(HINT_START, f"a page at {chain.writable[0][0]:#x} is hinted, and no command id came before")

    def _statistics(self, chain: SeenChain, raw: bytes) -> None:
        if self._stats:
            self.broke(ONE, f"{len(self._stats) + 1} buffers are in statsq")
        self._stats.add(chain.head)
        tags = sorted({tag for tag, _ in STAT_CODEC.iter_unpack(raw[: len(raw) // STAT_CODEC.size * STAT_CODEC.size])})
        if tags and self._tags and tags != self._tags:
            self.broke(SAME, f"statistics {tags}, and {self._tags} before")
        self._tags = tags or self._tags

    def _hint(self, chain: SeenChain, raw: bytes) -> None:
        if chain.out_length != 4:
            self.broke(HINT_SIZE, f"an output buffer of {chain.out_length:#x} bytes in free_page_vq")
        command = int.from_bytes(raw[:4], "little")
        if command == self._command and command != CommandId.STOP:
            self.broke(HINT_ONCE, f"command id {command:#x} came twice")
        self._command = command
        # What cannot be looked at may be an id.
        self._hinting = command != CommandId.STOP or len(raw) < min(chain.out_length, 4)

    def used(self, queue: int, head: int) -> None:
        """The device acknowledges."""
        if queue == 0:
            for page in _pages(self._inflating.pop(head, b"")):
                self._pages[page] -= 1
                if not self._pages[page]:
                    del self._pages[page]
        elif queue == 2:
            self._stats.discard(head)
