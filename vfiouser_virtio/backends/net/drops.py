"""Dropped frames of a network device: why, how many, and the lines of the log that say so.

::

    hub, tap, shaping, …   ──▶ Counters.tx_drops, rx_drops ─┐
    transmit and receive path  ──▶ Drops of the device     ─┴─▶ DropReport ──▶ net0: hub lan: dropped 12 to the guest
                                                                               (it had no receive buffer)
"""

import logging
from collections.abc import Callable, Sequence
from enum import IntEnum

import trio

from vfiouser_virtio.device_log import DeviceLog

GATHER = 0.5
"""Seconds from the first frame that is dropped to the line that says so: a burst is one line."""
INTERVAL = 60.0
"""Seconds at least between two such lines of a device: a guest that is too slow for its network stays so for days."""


class Drop(IntEnum):
    """Reason for which a frame is dropped. From `NO_BUFFERS` on it is a loss; those before are a network's daily life.

    The value counts nothing: what users read is in ``text``.
    """

    text: str

    def __new__(cls, text: str) -> "Drop":
        made = int.__new__(cls, len(cls.__members__))
        made._value_ = len(cls.__members__)
        made.text = text
        return made

    NO_DRIVER = "no driver was there"
    NO_CLIENT = "QEMU had gone"
    DRIVER_LEFT = "its driver left meanwhile"
    LINK_DOWN = "the link was down"
    NO_QUEUE = "the driver has no such queue"
    NO_PEER = "nobody was at the other end"
    NO_NETWORK = "there is no network behind it"
    OWN_PORT = "it was for a station at the same port"
    ISOLATED = "between isolated ports"
    CHANCE = "lost by loss="

    NO_BUFFERS = "it had no receive buffer"
    PEER_FULL = "the other end did not read them"
    SMALL_BUFFERS = "its receive buffers were too small"
    TOO_LONG = "too long"
    QUEUE_FULL = "more than may wait"
    MALFORMED = "malformed"
    BROKEN = "the driver has broken its receive queue"
    BAD_OFFLOAD = "the offload header was wrong"
    BAD_SENDER = "the sender's address was none"
    LOOP = "hubs were joined in a loop"
    REFUSED = "the host's kernel refused it"


_LOSSES = Drop.NO_BUFFERS


class Drops:
    """Number of frames that were dropped in one direction, by `Drop`. They only grow."""

    __slots__ = ("counts", "on_loss")

    def __init__(self) -> None:
        self.counts = [0] * len(Drop)
        """By the reason's number."""
        self.on_loss: Callable[[], None] | None = None
        """Called for each loss, where somebody waits for one."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(words(self.counts, '')) or 'none'}>"

    def __getitem__(self, why: Drop) -> int:
        return self.counts[why]

    def add(self, why: Drop, count: int = 1) -> None:
        """Count frames."""
        self.counts[why] += count
        if self.on_loss is not None and why >= _LOSSES and count:
            self.on_loss()

    @property
    def by_reason(self) -> dict[Drop, int]:
        """Frames by reason, of those that there were."""
        return {why: self.counts[why] for why in Drop if self.counts[why]}

    @property
    def total(self) -> int:
        """Frames, for whatever reason."""
        return sum(self.counts)


def words(counts: Sequence[int], where: str) -> list[str]:
    """``12 to the guest (it had no receive buffer)``, for each reason that there was; ``where`` begins with a space."""
    return [f"{counts[why]}{where} ({why.text})" for why in Drop if counts[why]]


class DropReport:
    """Lines of a device's log about what was dropped of its frames, on the way ``to_guest`` and ``from_guest``.

    `run` tells losses as they happen, once a minute; `driver_left` what has not been told of them; `end` tells all.
    ``describe`` says which network that is, and ``totals`` what has gone through, for those who want to see all.
    """

    def __init__(
        self,
        log: DeviceLog,
        describe: Callable[[], str],
        *,
        to_guest: Sequence[Drops],
        from_guest: Sequence[Drops],
        totals: Callable[[], str] = str,
    ) -> None:
        self._log = log
        self._describe = describe
        self._ways = tuple(to_guest), tuple(from_guest)
        self._totals = totals
        self._said = self._counts()
        self._said_totals = totals()
        self._not_before = -float("inf")

    async def run(self) -> None:
        """Tell losses as they happen, until cancelled."""
        try:
            while True:
                await trio.sleep_until(self._not_before)
                await self._wait_loss()
                await trio.sleep(GATHER)
                self._say_news()
                self._not_before = trio.current_time() + INTERVAL
        finally:
            self._call_at_loss(None)

    async def _wait_loss(self) -> None:
        lost = trio.Event()
        self._call_at_loss(lost.set)
        if _has_loss(self._news()):
            lost.set()
        await lost.wait()
        self._call_at_loss(None)

    def _call_at_loss(self, callback: Callable[[], None] | None) -> None:
        for drops in (*self._ways[0], *self._ways[1]):
            drops.on_loss = callback

    def driver_left(self) -> None:
        """The driver has reset the device: tell the losses that it had and that were not told."""
        if _has_loss(self._news()):
            self._say_news()
        self._say_totals()

    def end(self) -> None:
        """The device is no longer served: tell everything that was dropped while it was, if there was something."""
        counts = self._counts()
        self._say(logging.WARNING if _has_loss(counts) else logging.INFO, counts)
        self._say_totals()

    def _say_news(self) -> None:
        self._say(logging.INFO, self._news())
        self._said = self._counts()

    def _say(self, level: int, counts: tuple[list[int], list[int]]) -> None:
        to_guest, from_guest = counts
        dropped = words(to_guest, " to the guest") + words(from_guest, " from the guest")
        if dropped:
            self._log.log(level, "%s: dropped %s", self._describe(), ", ".join(dropped))

    def _say_totals(self) -> None:
        totals, before = self._totals(), self._said_totals
        if totals != before:
            self._said_totals = totals
            self._log.debug("%s: %s", self._describe(), totals)

    def _counts(self) -> tuple[list[int], list[int]]:
        to_guest, from_guest = (
            [sum(counts) for counts in zip(*(drops.counts for drops in way), strict=True)] for way in self._ways
        )
        return to_guest, from_guest

    def _news(self) -> tuple[list[int], list[int]]:
        to_guest, from_guest = (
            [now - before for now, before in zip(*way, strict=True)]
            for way in zip(self._counts(), self._said, strict=True)
        )
        return to_guest, from_guest


def _has_loss(counts: tuple[list[int], list[int]]) -> bool:
    return any(way[why] for way in counts for why in Drop if why >= _LOSSES)
