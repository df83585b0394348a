"""Outlet of a switch's port: hands frames to the port's device, and says how long others wait for it to have room."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import LENGTH, Frame
from vfiouser_virtio.backends.net.netdev import Counters, FrameSink, PutBurst, burst_putter
from vfiouser_virtio.backends.net.offload import finish, takes
from vfiouser_virtio.turns import turns

PATIENCE = 0.1
"""Seconds that a port without room may hold up those who send to it; then what comes for it is dropped.

They are held up whole: a guest's queue waits, with what is behind for others. A dead guest costs the others this much
once. It is a balance, so that none that takes a frame every 99 ms holds them up for good: it is used up by the time
without room, and grows by what the port takes (`MIN_BYTES`, `MIN_PACKETS`), and by a tenth of the time with room.
"""
MIN_BYTES, MIN_PACKETS = 3e6, 2000
"""What a port has to take in a second, one or the other, so that the others wait for it as long as it likes."""
_EARNED_WITH_ROOM = 0.1
# Segments of a packet that the device is handed together.
_BURST = 64
AT_ONCE = 128
"""Segments that are made and handed over in one go, some 0.5 ms: a packet has up to 1024, and a group many ports."""
MAX_KEPT = 64
"""Frames, of up to 64 KiB, that a port without room keeps of those that nobody waits with, such as broadcasts.

A guest that takes nothing, or floods those that are slow, must not fill the host's memory.
"""


class Outlet:
    """Way to the device of one port, while one is there; counts ``rx_packets``, ``rx_bytes`` and ``rx_drops``."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._sink: FrameSink | None = None
        self._put_burst: PutBurst = len
        # Packets that are being cut into segments, and frames that are kept. Nothing goes before them.
        self._rest: deque[Frame | Iterator[Frame]] = deque()
        self._paused = False  # there may be room for them, but others have their turns first
        self._has_rest = trio.Event()
        self._drop_at: float | None = None  # there is no room now, and from then on frames are dropped
        self._full_since = 0.0
        self._patience = PATIENCE
        self._room_since = 0.0
        self._counted = (0, 0)  # packets and bytes that have earned patience already

    @property
    def in_use(self) -> bool:
        """Whether there is a device."""
        return self._sink is not None

    def take(self, frame: Frame) -> bool:
        """Hand a frame to the device, or drop it for want of room: True. False: no room, but there may be soon.

        Raises BadOffload.
        """
        sink = self._sink
        counters = self._counters
        if sink is None:
            counters.rx_drops.add(Drop.NO_DRIVER)
            return True
        if self._rest:
            if self._paused or (not self._send_rest() and self._paused):
                return False  # it is not for want of room
            if self._rest:
                return self._no_room()
        if frame.offload is None or takes(sink.does, frame):
            if not sink.put(frame):
                return self._no_room()
            counters.rx_packets += 1
            counters.rx_bytes += frame.length
        else:
            self._rest.append(_finish_to_keep(frame, sink.does))
            if not self._send_rest() and not self._paused:
                return True
        if self._drop_at is not None:
            self._has_room()
        return True

    def take_or_keep(self, frame: Frame, at_once: int = AT_ONCE) -> None:
        """Hand a frame to the device, or keep a copy until it has room: who sends it waits for nobody.

        Of a packet that has to be cut so many segments are made ``at_once``; while another one is, it is dropped.
        Memory that is reached by messages has never room at once. Raises BadOffload.
        """
        sink = self._sink
        if sink is None:
            self._counters.rx_drops.add(Drop.NO_DRIVER)
            return
        ready = not self._rest or (not self._paused and self._send_rest(at_once))
        taken = frame.offload is None or takes(sink.does, frame)
        if ready and taken and sink.put(frame):
            self._counters.rx_packets += 1
            self._counters.rx_bytes += frame.length
        elif len(self._rest) >= MAX_KEPT or (self._paused and not taken):
            self._counters.rx_drops.add(Drop.NO_BUFFERS)
        else:
            self._rest.append(frame.copy() if taken else _finish_to_keep(frame, sink.does))
            if not self._paused:
                self._send_rest(at_once)

    def take_burst(self, frames: Sequence[Frame]) -> int:
        """As `take`, for the first of these frames, one at least, which the device is handed together; how many.

        0: no room. Raises BadOffload, which is about the first one.
        """
        sink = self._sink
        if sink is None or self._rest:
            return int(self.take(frames[0]))
        does = sink.does
        for count, frame in enumerate(frames):
            if frame.offload is not None and not takes(does, frame):
                if not count:
                    return int(self.take(frame))
                frames = frames[:count]
                break
        taken = self._put_burst(frames)
        if not taken:
            return int(self._no_room())
        counters = self._counters
        counters.rx_packets += taken
        counters.rx_bytes += sum(map(LENGTH, frames[:taken]))
        if self._drop_at is not None:
            self._has_room()
        return taken

    def _has_room(self) -> None:
        """Again, after it had none."""
        self._room_since = trio.current_time()
        self._patience = max(self._patience - (self._room_since - self._full_since), 0.0)
        self._drop_at = None

    def _no_room(self) -> bool:
        """Whether the frame is dropped for that."""
        counters = self._counters
        now = trio.current_time()
        if self._drop_at is None:
            packets, octets = self._counted
            earned = max((counters.rx_packets - packets) / MIN_PACKETS, (counters.rx_bytes - octets) / MIN_BYTES)
            earned += (now - self._room_since) * _EARNED_WITH_ROOM
            self._patience = min(self._patience + earned, PATIENCE)
            self._full_since = now
            self._counted = counters.rx_packets, counters.rx_bytes
            self._drop_at = now + self._patience
        if now < self._drop_at:
            return False
        counters.rx_drops.add(Drop.NO_BUFFERS)
        return True

    def _send_rest(self, at_once: int = AT_ONCE) -> bool:
        """Hand on what is left of packets; whether that was all of it."""
        rest, counters = self._rest, self._counters
        self._paused = False
        while some := self._next_of_rest(min(at_once, _BURST)):
            taken = self._put_burst(some)
            counters.rx_packets += taken
            counters.rx_bytes += sum(map(LENGTH, some[:taken]))
            if taken < len(some):
                rest.extendleft(reversed(some[taken:]))
                self._has_rest.set()
                return False
            at_once -= taken
        self._paused = bool(rest)
        if self._paused:
            self._has_rest.set()
        return not rest

    def _next_of_rest(self, count: int) -> list[Frame]:
        """Take so many frames, or fewer, from what is left."""
        rest = self._rest
        some: list[Frame] = []
        while rest and len(some) < count:
            first = rest[0]
            if isinstance(first, Frame):
                some.append(first)
            else:
                some += islice(first, count - len(some))
                if len(some) == count:
                    break
            rest.popleft()
        return some

    async def wait_room(self) -> None:
        """Wait until the device has room, or is waited for no more."""
        if self._sink is None or self._drop_at is None or self._paused:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_at(self._drop_at):
            await self._sink.wait_room()

    async def run(self, device: FrameSink) -> None:
        """Have this device, until cancelled."""
        counters = self._counters
        self._sink, self._put_burst = device, burst_putter(device)
        self._patience, self._drop_at = PATIENCE, None
        try:
            while True:
                await self._has_rest.wait()
                while self._rest:
                    if self._paused:
                        await turns().wait()
                    if not self._send_rest() and not self._paused:
                        await device.wait_room()
                self._has_rest = trio.Event()
        finally:
            self._sink = None
            counters.rx_drops.add(Drop.DRIVER_LEFT, len(self._rest))
            self._rest.clear()
            self._paused = False


def _finish_to_keep(frame: Frame, does: int) -> Iterator[Frame]:
    """As `finish`, with memory of their own: the sender's has other bytes by the time that there is room.

    Raises BadOffload.
    """
    pieces = finish(frame, does)
    return (each.copy() if each.segments is frame.segments else each for each in pieces)
