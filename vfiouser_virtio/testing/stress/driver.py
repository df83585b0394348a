"""Driver process of the stress test: adds buffers, kicks, takes buffers back, sleeps."""

import random
import time
from itertools import cycle

from vfiouser_virtio.testing.stress.game import (
    HALF,
    NUMBERS,
    SLOT,
    Failure,
    Score,
    Table,
    checksum,
    think,
    thoughts,
    vain_looks,
)

# How a buffer is cut: lengths of the pieces to read, of the pieces to write.
_CUTS = [([16], [16]), ([16], [16]), ([16], [16]), ([8, 8], [16]), ([8, 8], [8, 8]), ([1, 15], [15, 1])]


def drive(table: Table) -> None:
    """Play until the game is over. Raises Failure for what a correct device cannot do."""
    _StressDriver(table).play()


class _StressDriver:
    def __init__(self, table: Table) -> None:
        game = table.game
        self.table, self.vq, self.board = table, table.vq, table.board
        self.rng = random.Random(game.seed)
        self.slots = table.memory.alloc(SLOT * game.size)
        self.free = list(range(game.size))
        self.out: dict[int, int] = {}  # number -> its slot
        self.added = self.done = 0

    def play(self) -> None:
        game, vq, rng = self.table.game, self.vq, self.rng
        until = time.perf_counter() + game.seconds
        cuts = [cut for cut in _CUTS if len(cut[0]) + len(cut[1]) <= game.size] or [([16], [])]
        turns, looks = thoughts(rng), vain_looks(rng)
        bursts = cycle([rng.choice((1, 1, 2, 3, 8, game.size)) for _ in range(4091)])
        limit, looks_left = game.operations, next(looks)
        while True:
            if self.added < limit and self.free:
                for _ in range(min(next(bursts), limit - self.added)):
                    if not self._add(cuts[self.added % len(cuts)]):
                        break
                if time.perf_counter() > until:
                    limit = self.added
                vq.kick()
                think(next(turns))
            if self._take():
                if self.done == limit:
                    break
            elif looks_left:
                looks_left -= 1
            else:
                self._sleep()
                looks_left = next(looks)
        if vq.num_in_flight or self.out:
            raise Failure(f"{vq.num_in_flight} buffers are still in flight")

    def _add(self, cut: tuple[list[int], list[int]]) -> bool:
        needed = 1 if self.vq.indirect else len(cut[0]) + len(cut[1])
        if not self.free or self.vq.num_free < needed:
            return False
        slot, number = self.free.pop(), self.added
        start = SLOT * slot
        NUMBERS.pack_into(self.slots.view, start, number, checksum(number))
        address = self.slots.address + start
        sg = []
        for length in (*cut[0], *cut[1]):
            sg.append((address, length))
            address += length
        self.vq.add_buf(sg, len(cut[0]), len(cut[1]), number)
        self.out[number] = slot
        self.added += 1
        return True

    def _take(self) -> bool:
        """All used buffers: each once, with the right contents, in order if that was negotiated. False: none."""
        before = self.done
        get_buf, view, in_order = self.vq.get_buf, self.slots.view, self.table.game.in_order
        size_one = self.table.game.size == 1
        while (used := get_buf()) is not None:
            number, written = used
            slot = self.out.pop(number, None)
            if slot is None:
                raise Failure(f"buffer {number} has come back twice")
            if in_order and number != self.done:
                raise Failure(f"buffer {number} was used before {self.done}, in spite of IN_ORDER")
            if not size_one:
                found = NUMBERS.unpack_from(view, SLOT * slot + HALF)
                if written != HALF or found != (checksum(number), number):
                    raise Failure(f"buffer {number} has come back with {written} bytes, of {found[0]:#x}, {found[1]}")
            self.free.append(slot)
            self.done += 1
        if self.done == before:
            return False
        self.board[Score.DONE] = self.done
        return True

    def _sleep(self) -> None:
        """Until an interrupt, unless the queue says that there is something already."""
        # With callbacks on, get_buf() has asked for an interrupt before it said that there is nothing more.
        if not self.vq.callbacks_on and not self.vq.restart():
            return
        self.table.sleep(self.table.call, Score.DRIVER_ASLEEP, Score.DRIVER_SLEEPS)
        self.table.keep_callbacks = self.rng.random() < 0.5
        self.vq.interrupt()
