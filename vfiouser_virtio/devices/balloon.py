"""Memory balloon device (virtio 1.4, 5.5): guest RAM that is not needed goes back to the host; guest statistics.

::

    num_pages ──▶ driver ──▶ inflateq ──▶ holes in the guest's RAM       free pages ──▶ reporting_vq ──▶ the same
    actual    ◀── driver ──▶ deflateq                                    free pages ──▶ free_page_vq ──▶ hints

Only RAM that the client shares goes back (`virtio.guest_ram`). A page that a guest reads after it has given it is zero.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

import trio

# For `guest_ram`, which imports it late: while a device runs, others may have used up the file descriptors for that.
import vfiouser_virtio.memory_discard  # noqa: F401
from vfiouser_virtio.protocols.virtio import balloon as wire
from vfiouser_virtio.protocols.virtio.balloon import PAGE_SIZE, BalloonFeature, CommandId, Stat
from vfiouser_virtio.protocols.virtio.features import Feature as Reserved
from vfiouser_virtio.virtio import Chain, ConfigError, Device, DeviceError, Queue, queue, register
from vfiouser_virtio.virtio.options import Duration, Size

MAX_PFNS = 64 << 10
"""Pages of one request; Linux gives 256 at most. A chain could name a milliard of them, all in our memory at once."""
MAX_STATS = 64
"""Statistics of one buffer; there are 16 tags."""
MAX_HINTS = 64 << 10
"""Ranges that are kept of one round of hinting; Linux's have 4 MiB each."""
# Page numbers that are sorted in one go, which takes some 50 µs.
_AT_ONCE = 64
_TAGS = {int(tag): tag.name.lower() for tag in Stat}

Range = tuple[int, int]
"""DMA address and length, in bytes."""


class _Round:
    """One round of free page hinting."""

    def __init__(self, command: int) -> None:
        self.command = command
        self.started = False
        self.ranges: list[Range] = []
        self.ended = trio.Event()
        self.complete = False


@register
class Balloon(Device):
    """Balloon device: asks the guest for RAM, and hands it back to the host: see `set_target`, `statistics`.

    Raises ConfigError for a target that is no number of pages, or more than 2^32 of them.
    """

    device_id = wire.DEVICE_ID
    feature_bits = BalloonFeature
    driver_writes = frozenset({"actual", "poison_val"})
    inflateq = queue()
    deflateq = queue()
    statsq = queue()

    def __init__(
        self,
        *,
        target: Annotated[Size, "RAM to take from the guest at first, a multiple of 4K"] = 0,
        deflate_on_oom: Annotated[
            bool, "the guest may take its RAM back before it kills a process for lack of it"
        ] = False,
        free_page_reporting: Annotated[
            bool, "the guest reports pages that it has freed, in large pieces, and they go back to the host at once"
        ] = False,
        free_page_hint: Annotated[
            bool, "the guest says which pages are free when a program asks (Balloon.free_page_hints)"
        ] = False,
        stats_interval: Annotated[
            Duration | None, "log the guest's memory statistics this often, as JSON; default: never"
        ] = None,
    ) -> None:
        wanted = {
            BalloonFeature.DEFLATE_ON_OOM: deflate_on_oom,
            BalloonFeature.FREE_PAGE_HINT: free_page_hint,
            BalloonFeature.PAGE_POISON: free_page_reporting or free_page_hint,
            BalloonFeature.PAGE_REPORTING: free_page_reporting,
        }
        features = BalloonFeature.MUST_TELL_HOST.mask | BalloonFeature.STATS_VQ.mask
        for feature, offered in wanted.items():
            features |= feature.mask if offered else 0
        super().__init__(config=wire.Config(num_pages=_pages(target)), features=features)
        self.free_page_vq = self.add_queue() if free_page_hint or free_page_reporting else None
        self.reporting_vq = self.add_queue() if free_page_reporting else None
        self.stats_interval = stats_interval or None
        self.handed_back = 0
        """Bytes of guest RAM that went back to the host since the device was made."""
        self.ignored = 0
        """Bytes that the guest gave and that are no memory of its, or that one of the device's rings lies in."""
        self._last: dict[str, int] = {}
        self._answers = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._wanted = trio.Event()
        self._round: _Round | None = None
        self.last_command = 1
        """``free_page_hint_cmd_id`` of the last round of hints."""

    # ---- for programs ----------------------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes of RAM that the guest is asked for (``num_pages``)."""
        return self._config("num_pages") * PAGE_SIZE

    @property
    def actual(self) -> int:
        """Bytes of RAM that the guest says it has given (``actual``)."""
        return self._config("actual") * PAGE_SIZE

    def set_target(self, size: int) -> None:
        """Ask the guest for ``size`` bytes of its RAM in all, a multiple of 4096; less than before gives some back.

        Works at any time. When the guest does so, and whether, is up to it: `wait_actual`. Raises ConfigError.
        """
        self.config.update(num_pages=_pages(size))

    async def wait_actual(self, size: int | None = None) -> None:
        """Wait until the guest says that it has given ``size`` bytes, by default the target."""
        while self.actual != (self.target if size is None else size):
            await self._changed.park()

    @property
    def last_statistics(self) -> dict[str, int]:
        """What the guest has said last, by lower-case names of `Stat`; empty before it has said anything."""
        return dict(self._last)

    async def statistics(self) -> dict[str, int]:
        """Ask the guest for its memory statistics: ``memfree``, ``memtot``, … in bytes, ``majflt``, … in events.

        Waits until a driver answers, which negotiates STATS_VQ.
        """
        answers = self._answers
        self._wanted.set()
        while self._answers == answers:
            await self._changed.park()
        return self.last_statistics

    @asynccontextmanager
    async def free_page_hints(self) -> AsyncIterator[list[Range]]:
        """The (DMA address, length) ranges that the guest says are free; until the block ends it keeps them free.

        What it cannot keep it may use, but writes to before it reads it: what copies the guest's RAM may leave these
        ranges out if nothing was written to them since. They are not handed back to the host, for that cannot be known
        here. Raises DeviceError when the driver has not negotiated FREE_PAGE_HINT, when it resets the device meanwhile,
        and for a second block at the same time.
        """
        if not self.negotiated(BalloonFeature.FREE_PAGE_HINT) or self._round is not None:
            raise DeviceError("balloon: no free page hints: not negotiated, or asked for already")
        self.last_command = max(2, self.last_command + 1 & 0xFFFF_FFFF)
        now = self._round = _Round(self.last_command)
        self.config.update(free_page_hint_cmd_id=now.command)
        try:
            await now.ended.wait()
            if not now.complete:
                raise DeviceError("balloon: the device was reset, or closed, while the driver gave free page hints")
            yield now.ranges
        finally:
            if self._round is now:
                self._round = None
                self.config.update(free_page_hint_cmd_id=CommandId.DONE)

    # ---- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._inflate)
            nursery.start_soon(self._deflate)
            if self.negotiated(BalloonFeature.STATS_VQ):
                nursery.start_soon(self._collect_statistics)
            hints = self.negotiated(BalloonFeature.FREE_PAGE_HINT)
            if hints and self.free_page_vq is not None:
                nursery.start_soon(self._take_hints, self.free_page_vq)
            if self.negotiated(BalloonFeature.PAGE_REPORTING):
                # Linux before 6.11 gives numbers only to queues that it uses: without hints it reports to queue 3.
                for each in (self.reporting_vq, None if hints else self.free_page_vq):
                    if each is not None:
                        nursery.start_soon(self._take_reports, each)

    def config_written(self, field: str, value: int | bytes) -> None:
        if field == "actual":
            self.log.debug("the guest has given %s pages of %s", value, self.config["num_pages"])
            self._changed.unpark_all()

    def take_over(self, predecessor: Device) -> None:
        super().take_over(predecessor)
        if isinstance(predecessor, Balloon):
            self._last, self.last_command = predecessor.last_statistics, predecessor.last_command
            self.handed_back, self.ignored = predecessor.handed_back, predecessor.ignored
            # No id may be used again (5.5.6.6.2), and what the guest keeps free for a round it may have back.
            done = CommandId.DONE if predecessor.config["free_page_hint_cmd_id"] else CommandId.STOP
            self.config.set(free_page_hint_cmd_id=done)

    def close(self) -> None:
        self._end_round()

    def reset(self) -> None:
        self.config.set(actual=0, poison_val=0, free_page_hint_cmd_id=0)
        self._last.clear()
        self._changed.unpark_all()
        self._end_round()
        self.log.forget()

    def _end_round(self) -> None:
        if self._round is not None:
            self._round.ended.set()
            self._round = None

    # ---- inflate, deflate ------------------------------------------------------------------------------------------

    async def _inflate(self) -> None:
        # A page may be taken until the device knows that the guest has it back: without MUST_TELL_HOST that is when the
        # request is acknowledged, too early for the parts of a huge page that come in several requests.
        gather = self.negotiated(BalloonFeature.MUST_TELL_HOST)
        translated = self.negotiated(Reserved.ACCESS_PLATFORM)
        async for chain in self.inflateq:
            if translated:
                # The guest's page numbers are not what an IOMMU makes of them, and no DMA addresses.
                self.log.once(
                    "platform", "behind an IOMMU (ACCESS_PLATFORM) no page of the guest goes back to the host"
                )
            else:
                await self._hand_back(self.inflateq, chain, self._given(chain), gather=gather)
            chain.complete(0)

    async def _deflate(self) -> None:
        async for chain in self.deflateq:
            await self.guest_ram.retain(self._given(chain))
            chain.complete(0)

    def _given(self, chain: Chain) -> Iterator[Range]:
        """The pages that a request names."""
        size = wire.PFN_CODEC.size
        length = chain.readable.length
        if length % size or length > MAX_PFNS * size:
            self.log.once("pfns", "ignored: what is beyond whole page numbers, or beyond %d of them", MAX_PFNS)
        return _ranges(chain.readable.read(min(length, MAX_PFNS * size) & -size))

    async def _hand_back(self, queue: Queue, chain: Chain, ranges: Iterable[Range], *, gather: bool = False) -> None:
        done = await self.guest_ram.discard(ranges, gather=gather, still=partial(queue.has, chain))
        self.handed_back += done.handed_back
        self.ignored += done.unmapped + done.in_use
        if done.unmapped:
            self.log.once("unmapped", "ignored: the guest gives %#x bytes that are no memory of its", done.unmapped)
        if done.in_use:
            self.log.once("in use", "ignored: the guest gives %#x bytes that a ring of this device is in", done.in_use)

    # ---- free pages ------------------------------------------------------------------------------------------------

    async def _take_reports(self, reports: Queue) -> None:
        async for chain in reports:
            # Pages with a poison value must keep it (5.5.6.6), and a hole reads zeros.
            keeps = self.negotiated(BalloonFeature.PAGE_POISON) and self._config("poison_val") != 0
            if chain.readable.length:
                self.log.once("report", "ignored: a report of free pages that the device is to read")
            elif not keeps:
                await self._hand_back(reports, chain, chain.ranges)
            chain.complete(0)

    async def _take_hints(self, hints: Queue) -> None:
        async for burst in hints.bursts(at_once=True):
            for chain in burst:
                now = self._round
                if chain.readable.length:
                    command = int.from_bytes(chain.readable.read(min(chain.readable.length, 4)), "little")
                    if now is not None and command == now.command:
                        now.started = True
                    elif now is not None and now.started and command == CommandId.STOP:
                        now.complete = True
                        now.ended.set()
                elif now is not None and now.started and not now.ended.is_set():
                    now.ranges += chain.ranges[: MAX_HINTS - len(now.ranges)]
                chain.complete(0)

    # ---- statistics ------------------------------------------------------------------------------------------------

    async def _collect_statistics(self) -> None:
        """The buffer is kept until statistics are asked for: then the driver fills it anew (5.5.6.3)."""
        async for chain in self.statsq:
            self._last = dict(
                _statistics(chain.readable.read(min(chain.readable.length, MAX_STATS * wire.STAT_CODEC.size)))
            )
            self._answers += 1
            self._changed.unpark_all()
            if self.stats_interval is not None:
                told = {"target": self.target, "actual": self.actual, "handed_back": self.handed_back, **self._last}
                self.log.info("statistics %s", json.dumps(told))
            with trio.move_on_after(self.stats_interval if self.stats_interval is not None else float("inf")):
                await self._wanted.wait()
            self._wanted = trio.Event()
            chain.complete(0)

    def _config(self, field: str) -> int:
        value = self.config[field]
        assert isinstance(value, int)
        return value


def example() -> Balloon:
    """One with every feature, for tests."""
    return Balloon(target=1 << 20, deflate_on_oom=True, free_page_reporting=True, free_page_hint=True)


def _pages(size: int) -> int:
    pages, rest = divmod(size, PAGE_SIZE)
    if rest or not 0 <= pages < 1 << 32:
        raise ConfigError(f"balloon: target={size:#x} is no multiple of {PAGE_SIZE} bytes, or too much for the device")
    return pages


def _ranges(data: bytes) -> Iterator[Range]:
    """Page numbers as ranges, neighbours as one: each hole costs as much as some hundred pages in it.

    Only so many are looked at at a time: another one is not asked for before other tasks had their turns.
    """
    for at in range(0, len(data), _AT_ONCE * wire.PFN_CODEC.size):
        piece = data[at : at + _AT_ONCE * wire.PFN_CODEC.size]
        start = end = 0
        for pfn in sorted(pfn for (pfn,) in wire.PFN_CODEC.iter_unpack(piece)):
            if pfn > end or start == end:
                if start < end:
                    yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
                start = pfn
            end = max(end, pfn + 1)
        if start < end:
            yield start * PAGE_SIZE, (end - start) * PAGE_SIZE


def _statistics(data: bytes) -> Iterator[tuple[str, int]]:
    """Those with a tag that is known (5.5.6.3.2); what is less than a whole entry is none."""
    whole = len(data) // wire.STAT_CODEC.size * wire.STAT_CODEC.size
    for tag, value in wire.STAT_CODEC.iter_unpack(data[:whole]):
        if tag in _TAGS:
            yield _TAGS[tag], value
