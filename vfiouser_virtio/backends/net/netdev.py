"""Netdev: the protocol between a network device and a back end, the same in both directions.

::

    guest ──▶ device ──▶ netdev.put(frame) ──▶ network        False: no room now; `wait_room`, and offer it again
    guest ◀── device.put(frame) ◀── netdev.run ◀── network    the same protocol, `FrameSink`, the other way round

A frame is handed over in a call: nothing is kept, copied or made for it on the way unless somebody has to keep it. Who
has no room says so, and what becomes of the frame is up to who has it: wait, keep it, or drop it and count it.

Frames that come together go on together where the sink has a ``put_burst`` as well: see `burst_putter`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vfiouser_virtio.backends.net.drops import Drops
from vfiouser_virtio.backends.net.frame import Frame

MAX_FRAME = (64 << 10) + 54
"""Bytes of the longest frame: a TCP segment of 64 KiB - 1 with headers of Ethernet, VLAN and IPv6 before it."""


class Does(IntFlag):
    """Work of an `Offload` that a sink takes upon itself; for others it is done before they see the frame."""

    CSUM = 1
    """Completes checksums, or hands them on to who does."""
    TSO4 = 2
    TSO6 = 4
    ECN = 8
    USO = 16
    TUNNEL = 32
    """Segmentation of what is in a UDP tunnel, beside that of its kind."""
    TUNNEL_CSUM = 64
    """The outer UDP checksum of such segments."""
    LONG_TCP = 128
    """Takes TCP segments in frames of up to `LONG_FRAME`, longer than those of the connection: hardly any is cut."""


LONG_FRAME = 65520 + 14
"""Bytes of the longest Ethernet frame where the MTU is 65520, the longest that passt has."""
ALL = Does.CSUM | Does.TSO4 | Does.TSO6 | Does.ECN | Does.USO | Does.TUNNEL | Does.TUNNEL_CSUM
"""What a network of guests passes on untouched."""


@dataclass(slots=True)
class Counters:
    """Frames and bytes that have gone through a port, and frames that were dropped, by reason. They only grow."""

    tx_packets: int = 0
    tx_bytes: int = 0
    """From the guest to the network."""
    rx_packets: int = 0
    rx_bytes: int = 0
    """From the network to the guest."""
    tx_drops: Drops = field(default_factory=Drops)
    rx_drops: Drops = field(default_factory=Drops)

    def __str__(self) -> str:
        return (
            f"{self.tx_packets} frames ({self.tx_bytes} bytes) from the guest, "
            f"{self.rx_packets} ({self.rx_bytes} bytes) to it"
        )

    @property
    def tx_dropped(self) -> int:
        """Frames of the guest that were dropped, for whatever reason."""
        return self.tx_drops.total

    @property
    def rx_dropped(self) -> int:
        """Frames for the guest that were dropped, for whatever reason."""
        return self.rx_drops.total


class FrameSink(Protocol):
    """Taker of frames."""

    @property
    def does(self) -> Does:
        """Offloads that may be left in frames for it. It may change while it is used (a guest that resets)."""
        ...

    def put(self, frame: Frame) -> bool:
        """Take a frame now, whole, or drop it for good and count it: True. False: there is no room, it was not taken.

        Never waits. The frame's views are only used during the call.
        """
        ...

    async def wait_room(self) -> None:
        """Wait until `put` may take a frame again; it need not."""
        ...


PutBurst = Callable[[Sequence[Frame]], int]


def burst_putter(sink: FrameSink) -> PutBurst:
    """What puts frames into a sink, one after the other, until it has no room; returns how many were taken.

    That is the sink's own ``put_burst`` where it has one: a device shows its driver all of a burst at once.
    """
    of_its_own: PutBurst | None = _own(sink, "put_burst")
    if of_its_own is not None:
        return of_its_own
    put = sink.put

    def put_each(frames: Sequence[Frame]) -> int:
        for count, frame in enumerate(frames):
            if not put(frame):
                return count
        return len(frames)

    return put_each


class Read(NamedTuple):
    """Result of a `ReadBurst`."""

    frames: int
    """Those that were taken: delivered, or not wanted."""
    octets: int
    """Bytes of those that were delivered."""
    left: Frame | None
    """One that was read after these, with memory of its own, and that is to be offered by `FrameSink.put`."""
    end: OSError | None
    """Error of the last read: BlockingIOError where there is nothing more; None where there may be."""
    room: bool
    """False: there is no room, and nothing was read: see `FrameSink.wait_room`."""


ReadBurst = Callable[[int, int, int, memoryview], Read | None]
"""Arguments of a ``read_burst``: file descriptor, bytes of the header, most frames, memory for the end of long ones."""


def burst_reader(sink: FrameSink) -> ReadBurst | None:
    """What reads frames from a file straight to where a sink has them, if it can: its own ``read_burst``.

    Each read(2) brings one frame, with struct virtio_net_hdr before it. None of the result: they are to be read
    elsewhere, and put.
    """
    found: ReadBurst | None = _own(sink, "read_burst")
    return found


CopyBurst = Callable[[memoryview, Sequence[tuple[int, int]]], int]
"""Arguments of a ``copy_burst``: memory with frames in it, and where they begin, with their lengths."""


def burst_copier(sink: FrameSink) -> CopyBurst | None:
    """What takes complete frames out of one memory, without an object for each, if a sink can: its own ``copy_burst``.

    It returns how many were taken; the one behind those has to be put.
    """
    found: CopyBurst | None = _own(sink, "copy_burst")
    return found


def nowait_receiver(sink: FrameSink) -> Callable[[], bool] | None:
    """What hands over the network's frames while `Netdev.run` waits for some, if a sink can: its ``receive_nowait``.

    A device calls it where it polls anyway: it saves a round of the event loop, which is more than all that is done for
    one frame. It returns whether any had come; False also where that takes the task, which has its turn then.
    """
    found: Callable[[], bool] | None = _own(sink, "receive_nowait")
    return found


def _own(sink: FrameSink, name: str) -> Any:
    """An optional method of a sink, unless it is that of a base class whose `put`, or ``put_burst``, was overridden."""
    for each in type(sink).__mro__:
        if name in vars(each):
            return getattr(sink, name)
        if "put" in vars(each) or "put_burst" in vars(each):
            break
    return None


class Netdev(FrameSink, Protocol):
    """Back end of a network device: a `FrameSink` for the guest's frames, whose `run` brings those of the network.

    It outlives resets of the device; `run` may be started again and again, and `put` needs it running.
    """

    @property
    def link(self) -> bool:
        """Whether there is a network at the other end."""
        ...

    @property
    def counters(self) -> Counters:
        """What has gone through, and what was dropped."""
        ...

    def describe(self) -> str:
        """Where a user finds the other end: ``hub lan``, ``tap tap0``."""
        ...

    async def run(self, device: FrameSink) -> None:
        """Hand the network's frames to ``device``, until cancelled."""
        ...

    async def wait_link(self) -> None:
        """Return after the next change of `link`."""
        ...

    def close(self) -> None:
        """Let go of everything on the host. Called once, without waiting."""
        ...


@runtime_checkable
class QueuedNetdev(Netdev, Protocol):
    """`Netdev` with several queues, over which it spreads flows: it wants to know which of them the guest has used."""

    @property
    def queues(self) -> Sequence[FrameSink]:
        """For the device's queue pairs, in order: what the guest sends on one of them goes there."""
        ...

    def use(self, count: int) -> None:
        """The driver has so many queue pairs in use from now on."""
        ...


def sinks_of(netdev: Netdev, pairs: int) -> list[FrameSink]:
    """Where the frames go that the guest sends on each of so many queue pairs."""
    queues = netdev.queues if isinstance(netdev, QueuedNetdev) else [netdev]
    return [queues[pair % len(queues)] for pair in range(pairs)]
