"""Ledger of a disk's writes: numbered blocks, which were begun, completed and flushed, and whether they are there.

Every write has a number, which no other one ever has, and fills one block; every sector of that names the number. The
ledger is a file that both the guest and its judge have mapped, so that what a guest wrote down outlives its death.
"""

import mmap
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Self

SECTOR = 512
BLOCK_SECTORS = 8
BLOCK = SECTOR * BLOCK_SECTORS

_ENTRY = struct.Struct("<IB3x")  # block, state
_SECTOR = struct.Struct("<8sQII")
_MAGIC = b"numbered"


class WriteState(IntEnum):
    """Stage of a write."""

    NONE = 0
    STARTED = 1
    """The guest has asked for it, or was about to."""
    COMPLETED = 2
    FLUSHED = 3
    """A flush that was asked for after its completion has ended well: it is on the disk, or a later one is."""


def sector_content(number: int, block: int, index: int) -> bytes:
    """The bytes of a sector of a numbered block."""
    head = _SECTOR.pack(_MAGIC, number, block, index)
    word = struct.pack("<Q", (number * 0x9E37_79B9_7F4A_7C15 + index) & (1 << 64) - 1)
    return head + word * ((SECTOR - len(head)) // 8)


def block_content(number: int, block: int) -> bytes:
    """The bytes of a numbered block."""
    return b"".join(sector_content(number, block, index) for index in range(BLOCK_SECTORS))


class Ledger:
    """Ledger with room for ``room`` writes to a disk of ``blocks`` blocks. A context manager."""

    def __init__(self, path: Path, *, blocks: int, room: int) -> None:
        self.blocks, self.room = blocks, room
        with path.open("a+b") as file:
            file.truncate(_ENTRY.size * (room + 1))
            self._map = mmap.mmap(file.fileno(), 0)
        self._next = next((n for n in range(1, room + 1) if self._state(n) == WriteState.NONE), room + 1)

    def close(self) -> None:
        """Let the file go."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the guest's side ------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether there is no room for another write."""
        return self._next > self.room

    def start(self, block: int) -> int:
        """The number of a write that is about to be asked for."""
        number, self._next = self._next, self._next + 1
        # The state last: what is not written down was not begun.
        self._map[number * _ENTRY.size : number * _ENTRY.size + 4] = block.to_bytes(4, "little")
        self._map[number * _ENTRY.size + 4] = WriteState.STARTED
        return number

    def note(self, number: int, state: WriteState) -> None:
        """A write has come so far."""
        self._map[number * _ENTRY.size + 4] = state

    # ---- the judge's -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Another process has made entries."""
        while self._next <= self.room and self._state(self._next) != WriteState.NONE:
            self._next += 1

    @property
    def started(self) -> int:
        """How many writes there were."""
        self.refresh()
        return self._next - 1

    @property
    def flushed(self) -> int:
        """How many of them were flushed."""
        return sum(self._state(number) == WriteState.FLUSHED for number in range(1, self.started + 1))

    def _state(self, number: int) -> int:
        return self._map[number * _ENTRY.size + 4]

    def complaints(self, disk: bytes) -> Iterator[str]:
        """What is wrong with the content of the disk: a line for each block that has not what it may have.

        Every sector of a block is that of its last flushed write, or of one that was begun after it; whole, in its
        place. (virtio 1.4, 5.2.6.2: what was completed before a flush is not lost after it. A sector is written
        as one; of a block more than one write may be there where none of the later ones was flushed.)
        """
        least = [0] * self.blocks
        allowed: list[set[int]] = [{0} for _ in range(self.blocks)]
        for number in range(1, self.started + 1):
            block, state = _ENTRY.unpack_from(self._map, number * _ENTRY.size)
            if state == WriteState.FLUSHED:
                least[block], allowed[block] = number, {number}
            else:
                allowed[block].add(number)
        for block in range(self.blocks):
            for index in range(BLOCK_SECTORS):
                at = block * BLOCK + index * SECTOR
                found = disk[at : at + SECTOR]
                magic, number, _, _ = _SECTOR.unpack_from(found)
                if found == bytes(SECTOR):
                    magic, number = _MAGIC, 0
                where = f"block {block}, sector {index}"
                if magic != _MAGIC or (number and found != sector_content(number, block, index)):
                    yield f"{where}: torn, or another one's: {found[:32].hex()}…"
                elif number not in allowed[block]:
                    kind = "lost" if number < least[block] else "never written there"
                    yield f"{where}: write {number}, {kind}: flushed was {least[block]}, later ones {allowed[block]}"
