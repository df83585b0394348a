"""Rules, memory and score board of one game of the stress test, shared by both processes and the referee."""

import mmap
import os
import random
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import cycle
from struct import Struct

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.guest import DriverVirtqueue, make_virtqueue
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of

RAM = 1 << 23
SLOT = 32
"""Bytes of a buffer: 16 that the device reads, 16 that it writes, each a number and its checksum."""
HALF = SLOT // 2

NUMBERS = Struct("<QQ")
_MASK = (1 << 64) - 1

# How long to think, in turns of an empty loop (some 20 ns each): mostly not at all, now and then longer than it takes
# the other side to do its work and go to sleep.
_THINKING = [0] * 24 + [5, 20, 50, 100, 200, 400, 1000, 3000]
# How often to look in vain before going to sleep: from not at all to longer than the other side ever takes.
_LOOKS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 5, 10, 20, 50, 50, 100, 100, 200]

# How often to look at an eventfd before the kernel is asked to wait for it. To be woken takes 50 µs.
_LIGHT_SLEEP = 20


class Failure(Exception):
    """Failure of a game: a buffer or a wake-up is lost, or what was read is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """Parameters of a game: one queue and how long it is used."""

    packed: bool = False
    size: int = 64
    event_idx: bool = True
    indirect: bool = True
    in_order: bool = False
    operations: int = 100_000
    """Buffers that go there and back."""
    seconds: float = 3600.0
    """No new buffers after this time."""
    seed: int = 0
    through_queue: bool = False
    """The device side is a `virtio.Queue` in trio, not a bare ring."""
    sabotage: str = ""
    """Break something on purpose (`sabotage.SABOTAGE`)."""

    @property
    def features(self) -> int:
        """What is negotiated, as a mask."""
        wanted = {
            Feature.VERSION_1: True,
            Feature.RING_PACKED: self.packed,
            Feature.EVENT_IDX: self.event_idx,
            Feature.INDIRECT_DESC: self.indirect,
            Feature.IN_ORDER: self.in_order,
        }
        return mask_of(feature for feature, on in wanted.items() if on)

    def __str__(self) -> str:
        names = [
            "packed" if self.packed else "split",
            str(self.size),
            *(name for name in ("event_idx", "indirect", "in_order", "through_queue") if getattr(self, name)),
        ]
        return f"{' '.join(names)} seed {self.seed}"


@dataclass(frozen=True)
class GameResult:
    """Result of a game."""

    operations: int
    seconds: float
    driver_sleeps: int
    device_sleeps: int


class Score(IntEnum):
    """Words of the score board, each written by one process."""

    DONE = 0
    """Buffers that have come back."""
    TAKEN = 1
    """Buffers that the device has taken."""
    DRIVER_ASLEEP = 2
    DRIVER_SLEEPS = 3
    DEVICE_ASLEEP = 4
    DEVICE_SLEEPS = 5
    OVER = 6
    """The driver has all buffers back and wants no more."""


def checksum(number: int) -> int:
    """64 bits that look like nothing else nearby."""
    return (number * 0x9E37_79B9_7F4A_7C15 ^ 0x5555_5555_5555_5555) & _MASK


def think(turns: int) -> None:
    """Be busy for a moment."""
    for _ in range(turns):
        pass


def thoughts(rng: random.Random) -> Iterator[int]:
    """How long to think each time, without end."""
    return cycle([rng.choice(_THINKING) for _ in range(4099)])


def vain_looks(rng: random.Random) -> Iterator[int]:
    """How often to look in vain each time before going to sleep, without end."""
    return cycle([rng.choice(_LOOKS) for _ in range(4093)])


@dataclass
class Table:
    """Memory, queue and counters of a game; made before the processes part."""

    game: Game
    memory: SharedMemory = field(init=False)
    vq: DriverVirtqueue = field(init=False)
    kick: int = field(init=False)
    """The eventfd that wakes the device."""
    call: int = field(init=False)
    """The eventfd that wakes the driver."""
    board: memoryview = field(init=False)
    device_side: object = None
    """The device's ring or queue, for messages; in the device's process."""
    keep_callbacks: bool = True
    """What the driver's callback returns."""

    def __post_init__(self) -> None:
        game = self.game
        self.memory = SharedMemory(RAM)
        self.kick, self.call = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
        self.board = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.vq = make_virtqueue(
            self.memory,
            0,
            game.size,
            lambda: os.eventfd_write(self.kick, 1),
            lambda _vq: self.keep_callbacks,
            features=game.features,
        )

    def sleep(self, fd: int, asleep: Score, sleeps: Score) -> None:
        """Until the other side writes to the eventfd: lightly at first, so that there are more sleeps in a second."""
        self.board[asleep] = 1
        self.board[sleeps] += 1
        light = select.poll()
        light.register(fd, select.POLLIN)
        for _ in range(_LIGHT_SLEEP):
            if light.poll(0):
                break
        while True:
            try:
                os.eventfd_read(fd)
            except InterruptedError:  # the referee has asked what we know
                continue
            break
        self.board[asleep] = 0

    def close(self) -> None:
        """After the last game at it."""
        os.close(self.kick)
        os.close(self.call)
        self.memory.close()
