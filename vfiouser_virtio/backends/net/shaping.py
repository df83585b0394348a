"""Shaping of a netdev: delay, jitter, loss, duplication, reordering and rate, as ``tc netem`` has them, by a seed.

For tests of drivers and protocols: the same frames at the same times have the same fate for the same seed.
"""

import heapq
import math
import random
from typing import Annotated

import trio

from vfiouser_virtio.backends.net.drops import Drop, Drops
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import FrameSink, Netdev
from vfiouser_virtio.backends.net.netfilter import NetFilter
from vfiouser_virtio.backends.net.offload import BadOffload, finish
from vfiouser_virtio.errors import ConfigError

MAX_FRAMES = 4096
MAX_BYTES = 16 << 20
"""What waits in one direction; more is dropped, as a router does it, and netem beyond its ``limit``.

A guest that sends without an end into a delay of an hour must not fill the host's memory.
"""
_MAX_DELAY_MS = 3_600_000
# Frames, or segments that one is cut into, between two looks at what other tasks have to do.
_BURST = 64


class Shaped(NetFilter):
    """`Netdev` before another one, which delays, drops, doubles and reorders frames in both directions.

    A frame's fate is drawn once for the whole of it, also where it is a packet that is still to be cut. What is dropped
    for any reason is counted in the other netdev's `Counters`, which are these ones too.
    Raises ConfigError for a number that is out of its range.
    """

    def __init__(
        self,
        netdev: Netdev,
        *,
        delay_ms: Annotated[float, "hold every frame up so many milliseconds, in both directions each"] = 0,
        jitter_ms: Annotated[float, "so much more or less delay, by chance: frames overtake each other"] = 0,
        loss: Annotated[float, "percentage of frames that are lost"] = 0,
        duplicate: Annotated[float, "percentage of frames that come twice"] = 0,
        reorder: Annotated[float, "percentage of frames that are not delayed, and so come before others"] = 0,
        rate: Annotated[float, "Mbit/s that go through at most, in each direction; 0: any"] = 0,
        seed: Annotated[int, "what chance does; another seed, other frames that are lost"] = 0,
    ) -> None:
        for name, value, limit in (
            ("delay-ms", delay_ms, _MAX_DELAY_MS),
            ("jitter-ms", jitter_ms, _MAX_DELAY_MS),
            ("loss", loss, 100),
            ("duplicate", duplicate, 100),
            ("reorder", reorder, 100),
            ("rate", rate, 1e9),
        ):
            if not 0 <= value <= limit:
                raise ConfigError(f"{name}={value:g}: expected 0 to {limit:.0f}")
        if jitter_ms > delay_ms:
            raise ConfigError(
                f"jitter-ms={jitter_ms:g}: more than delay-ms={delay_ms:g}: frames cannot come before they go"
            )
        if reorder and not delay_ms:
            raise ConfigError(f"reorder={reorder:g}: needs delay-ms, or there is nothing to come before")
        super().__init__(netdev)
        shape = _Shape(delay_ms / 1000, jitter_ms / 1000, loss / 100, duplicate / 100, reorder / 100, rate * 1e6 / 8)
        self._out = _Way(shape, random.Random(f"{seed} out"))
        self._in = _Way(shape, random.Random(f"{seed} in"))
        self._text = ", ".join(
            f"{name} {value:g}{unit}"
            for name, value, unit in (
                ("delay", delay_ms, " ms"),
                ("jitter", jitter_ms, " ms"),
                ("loss", loss, " %"),
                ("duplicate", duplicate, " %"),
                ("reorder", reorder, " %"),
                ("rate", rate, " Mbit/s"),
                ("seed", seed, ""),
            )
            if value
        )

    def describe(self) -> str:
        """``hub lan with delay 10 ms, loss 1 %``."""
        return f"{super().describe()} with {self._text}" if self._text else super().describe()

    def put(self, frame: Frame) -> bool:
        self._out.put(frame, self.counters.tx_drops)
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    def put_in(self, frame: Frame, device: FrameSink) -> bool:  # noqa: ARG002 - the device gets it later
        self._in.put(frame, self.counters.rx_drops)
        return True

    async def run(self, device: FrameSink) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super().run, device)
                nursery.start_soon(self._carry_out)
                nursery.start_soon(self._carry_in, device)
        finally:  # another driver gets nothing that was for this one
            self.counters.tx_drops.add(Drop.DRIVER_LEFT, self._out.clear())
            self.counters.rx_drops.add(Drop.DRIVER_LEFT, self._in.clear())

    async def _carry_out(self) -> None:
        async for frame in self._out:
            if not await _hand_on(frame, self.netdev):
                self.counters.tx_drops.add(Drop.BAD_OFFLOAD)

    async def _carry_in(self, device: FrameSink) -> None:
        async for frame in self._in:
            if not await _hand_on(frame, device):
                self.counters.rx_drops.add(Drop.BAD_OFFLOAD)


class _Shape:
    """Numbers of one direction: seconds, probabilities, bytes per second (0: any)."""

    def __init__(self, delay: float, jitter: float, loss: float, duplicate: float, reorder: float, rate: float) -> None:
        self.delay, self.jitter, self.loss, self.duplicate = delay, jitter, loss, duplicate
        self.reorder, self.rate = reorder, rate


class _Way:
    """Frames on their way in one direction; iterate over it to get them when their time has come."""

    def __init__(self, shape: _Shape, chance: random.Random) -> None:
        self._shape = shape
        self._random = chance.random
        self._frames: list[tuple[float, int, Frame]] = []  # a heap: by time, then by number
        self._bytes = 0
        self._in_hand = 0  # frames that were given out and may not be where they go
        self._number = 0
        self._sent = -math.inf  # when what was put in has gone through at this rate
        self._changed = trio.Event()
        self._burst = 0

    def put(self, frame: Frame, drops: Drops) -> None:
        """Take a frame, or lose it."""
        shape, chance = self._shape, self._random
        # All are drawn for every frame: whether others are duplicated does not change which are lost.
        lost, doubled, early, more, still_more = chance(), chance(), chance(), chance(), chance()
        if lost < shape.loss:
            drops.add(Drop.CHANCE)
            return
        jitters = [more, still_more] if doubled < shape.duplicate else [more]
        now = trio.current_time()
        copy: Frame | None = None
        for jitter in jitters:
            if len(self._frames) >= MAX_FRAMES or self._bytes + frame.length > MAX_BYTES:
                drops.add(Drop.QUEUE_FULL)
                continue
            copy = copy or frame.copy()
            at = now
            if shape.rate:
                at = self._sent = max(now, self._sent) + frame.length / shape.rate
            if not early < shape.reorder:
                at += shape.delay + shape.jitter * (2 * jitter - 1)
            self._number += 1
            heapq.heappush(self._frames, (at, self._number, copy))
            self._bytes += frame.length
            if self._frames[0][1] == self._number:
                self._changed.set()

    def clear(self) -> int:
        """Lose all, and the time that they would have taken; how many that were."""
        count = len(self._frames) + self._in_hand
        self._frames.clear()
        self._in_hand = 0
        self._bytes = 0
        self._sent = -math.inf
        return count

    def __aiter__(self) -> "_Way":
        return self

    async def __anext__(self) -> Frame:
        self._in_hand = 0
        while not self._frames or self._frames[0][0] > trio.current_time():
            self._burst = 0
            with trio.move_on_at(self._frames[0][0] if self._frames else math.inf):
                await self._changed.wait()
            self._changed = trio.Event()
        self._burst += 1
        if self._burst >= _BURST:
            self._burst = 0
            await trio.lowlevel.checkpoint()
        frame = heapq.heappop(self._frames)[2]
        self._bytes -= frame.length
        self._in_hand = 1
        return frame


async def _hand_on(frame: Frame, sink: FrameSink) -> bool:
    """Whether the frame was as its offload header says: what a sink takes may have changed while it was on its way."""
    try:
        for number, piece in enumerate(finish(frame, sink.does), 1):
            while not sink.put(piece):
                await sink.wait_room()
            if not number % _BURST:
                await trio.lowlevel.checkpoint()
    except BadOffload:
        return False
    return True
