"""A driver of packed virtqueues (virtio 1.4, 2.8), slow and plain."""

import random

from support.ring_model.driver import EVERY, INDIRECT, NEXT, NONE, WRITE, Buffer, Driver, Element, Layout, Position
from support.ring_model.ram import Ram

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2


class PackedDriver(Driver):
    """Positions are (offset, wrap counter); a ring begins at (0, 1)."""

    def __init__(
        self, ram: Ram, size: int, layout: Layout, *, event_idx: bool, in_order: bool, rng: random.Random
    ) -> None:
        super().__init__(ram, size, layout, event_idx=event_idx, in_order=in_order, rng=rng)
        self.next = 0, 1
        self.next_used = 0, 1
        self.device_next = 0, 1
        """Where the device must write its next used descriptor."""
        self.ids = list(range(size))
        self.heads: list[tuple[int, int]] = []
        """(address, flags) of the first descriptors of what was added: stored last."""

    def after(self, position: tuple[int, int], count: int = 1) -> tuple[int, int]:
        """The position so many descriptors later; each end of the ring turns the wrap counter (2.8.1)."""
        offset, wrap = position
        for _ in range(count):
            offset += 1
            if offset == self.size:
                offset, wrap = 0, 1 - wrap
        return offset, wrap

    def free(self) -> int:
        return self.size - sum(len(buffer.descriptors) for buffer in self.added + self.outstanding)

    def add(self, elements: list[Element], direct: int) -> Buffer:
        """2.8.21.1; all in the ring, or all in a table: "each list only contains descriptors of a given type"."""
        key = self.ids.pop(self.rng.randrange(len(self.ids)))
        tables = []
        if direct >= len(elements):
            parts = [(element.address, element.length, WRITE * element.writable) for element in elements]
        else:
            tables = [self.free_tables.pop()]
            for index, element in enumerate(elements):
                # "WRITE is the only valid flag", and the buffer id is reserved (2.8.7).
                place = tables[0] + 16 * index
                self._store(place, element.address, element.length, self.rng.randrange(1 << 16))
                self.ram.put(place + 14, 2, WRITE * element.writable)
            parts = [(tables[0], 16 * len(elements), INDIRECT | self.rng.choice([0, WRITE]))]
        places = []
        for index, (address, length, flags) in enumerate(parts):
            offset, wrap = self.next
            last = index == len(parts) - 1
            flags |= AVAIL * wrap | USED * (1 - wrap) | NEXT * (not last)
            place = self.desc + 16 * offset
            # "Buffer ID is included in the last descriptor in the list": elsewhere it is not looked at.
            self._store(place, address, length, key if last else self.rng.randrange(1 << 16))
            if index:
                self.ram.put(place + 14, 2, flags)
            else:
                self.heads.append((place + 14, flags))
            places.append(offset)
            self.to_announce.append(self.next)
            self.next = self.after(self.next)
        buffer = Buffer(elements, key, places, tables)
        self.added.append(buffer)
        return buffer

    def show(self) -> None:
        # From behind, so that the device sees all or nothing; it would be allowed to see some.
        for place, flags in reversed(self.heads):
            self.ram.put(place, 2, flags)
        self.heads = []
        self.outstanding += self.added
        self.added = []

    def collect(self) -> list[tuple[Buffer, int | None]]:
        found: list[tuple[Buffer, int | None]] = []
        while self._is_used(self.next_used):
            place = self.desc + 16 * self.next_used[0]
            key, flags = self.ram.get(place + 12, 2), self.ram.get(place + 14, 2)
            # "Element Length is reserved for used descriptors without the WRITE flag."
            written = self.ram.get(place + 8, 4) if flags & WRITE else 0
            for buffer in self.batch(key):
                self.release(buffer)
                self.ids.append(buffer.key)
                self.next_used = self.after(self.next_used, len(buffer.descriptors))
                found.append((buffer, written if buffer.key == key else None))
        return found

    def _is_used(self, position: tuple[int, int]) -> bool:
        offset, wrap = position
        flags = self.ram.get(self.desc + 16 * offset + 14, 2)
        return bool(self.outstanding) and bool(flags & AVAIL) == bool(flags & USED) == bool(wrap)

    def ask(self, wish: int | str) -> None:
        if isinstance(wish, int):
            if not self.event_idx:
                return
            offset, wrap = self.after(self.next_used, wish)
            self.ram.put(self.driver, 2, offset | wrap << 15)
            self.ram.put(self.driver + 2, 2, DESC)
        else:
            self.ram.put(self.driver + 2, 2, ENABLE if wish == EVERY else DISABLE)

    def wish(self) -> Position:
        return self._wish(self.driver)

    def device_wish(self) -> Position:
        return self._wish(self.device)

    def publishing(self, done: list[Buffer]) -> list[tuple[int, int]]:
        position, places = self.device_next, []
        for buffer in done:
            places.append((self.desc + 16 * position[0], 16))
            position = self.after(position, len(buffer.descriptors))
        return places

    def published(self, done: list[Buffer]) -> None:
        for buffer in done:
            for _ in buffer.descriptors:
                self.used.append(self.device_next)
                self.device_next = self.after(self.device_next)

    @property
    def wish_area(self) -> tuple[int, int]:
        return self.device, 4

    def _wish(self, structure: int) -> Position:
        off_wrap, flags = self.ram.get(structure, 2), self.ram.get(structure + 2, 2)
        allowed = (ENABLE, DISABLE, DESC) if self.event_idx else (ENABLE, DISABLE)
        assert flags in allowed, f"event flags {flags:#x} (2.8.10)"
        if flags == DESC:
            position = off_wrap & 0x7FFF, off_wrap >> 15
            assert position[0] < self.size, f"event offset {position[0]:#x} of {self.size:#x}"
            return position
        return EVERY if flags == ENABLE else NONE

    def _store(self, place: int, address: int, length: int, key: int) -> None:
        for offset, size, value in ((0, 8, address), (8, 4, length), (12, 2, key)):
            self.ram.put(place + offset, size, value)
