"""A driver of split virtqueues (virtio 1.4, 2.7), slow and plain."""

import random

from support.ring_model.driver import EVERY, INDIRECT, NEXT, NONE, WRITE, Buffer, Driver, Element, Layout, Position
from support.ring_model.ram import Ram


class SplitDriver(Driver):
    """``start`` is the value of all indexes at the beginning: 0, if nothing had come before."""

    def __init__(
        self,
        ram: Ram,
        size: int,
        layout: Layout,
        *,
        event_idx: bool,
        in_order: bool,
        rng: random.Random,
        start: int = 0,
    ) -> None:
        super().__init__(ram, size, layout, event_idx=event_idx, in_order=in_order, rng=rng)
        self.unused = list(range(size))
        """Free descriptors, in the order in which an in-order driver takes them."""
        self.avail_idx = self.used_idx = start
        self.device_idx = start
        """used.idx as the device must have stored it."""
        ram.put(self.driver + 2, 2, start)
        ram.put(self.device + 2, 2, start)
        self._used_entries: dict[int, tuple[int, int]] = {}

    def free(self) -> int:
        return len(self.unused)

    def add(self, elements: list[Element], direct: int) -> Buffer:
        """2.7.13.1: ``direct`` descriptors, then one that refers to a table with the others, if there are others."""
        rest = elements[direct:]
        count = direct + bool(rest)
        indexes = [self._take_descriptor() for _ in range(count)]
        tables = [self.free_tables.pop()] if rest else []
        for place, index in enumerate(indexes):
            following = indexes[place + 1] if place + 1 < count else None
            if place < direct:
                self._describe(self.desc, index, elements[place], following)
            else:
                ignored = self.rng.choice([0, WRITE])  # "MUST ignore the write-only flag" (2.7.5.3.2)
                self._store(
                    self.desc, index, tables[0], 16 * len(rest), INDIRECT | ignored, self.rng.randrange(1 << 16)
                )
                self._fill_table(tables[0], rest)
        buffer = Buffer(elements, indexes[0], indexes, tables)
        self.ram.put(self.driver + 4 + 2 * ((self.avail_idx + len(self.added)) % self.size), 2, buffer.key)
        self.added.append(buffer)
        return buffer

    def show(self) -> None:
        for buffer in self.added:
            self.to_announce.append(self.avail_idx)
            self.avail_idx = (self.avail_idx + 1) % 0x10000
            self.outstanding.append(buffer)
        self.added = []
        self.ram.put(self.driver + 2, 2, self.avail_idx)

    def collect(self) -> list[tuple[Buffer, int | None]]:
        found: list[tuple[Buffer, int | None]] = []
        shown = self.ram.get(self.device + 2, 2)
        while self.used_idx != shown:
            entry = self.device + 4 + 8 * (self.used_idx % self.size)
            key, written = self.ram.get(entry, 4), self.ram.get(entry + 4, 4)
            for buffer in self.batch(key):
                self.release(buffer)
                self.unused += buffer.descriptors
                self.used_idx = (self.used_idx + 1) % 0x10000
                found.append((buffer, written if buffer.key == key else None))
        return found

    def ask(self, wish: int | str) -> None:
        if not self.event_idx:
            self.ram.put(self.driver, 2, int(wish == NONE))
        elif isinstance(wish, int):
            self.ram.put(self.driver + 4 + 2 * self.size, 2, (self.used_idx + wish) % 0x10000)

    def wish(self) -> Position:
        if self.event_idx:
            return self.ram.get(self.driver + 4 + 2 * self.size, 2)
        return NONE if self.ram.get(self.driver, 2) & 1 else EVERY

    def device_wish(self) -> Position:
        flags = self.ram.get(self.device, 2)
        if self.event_idx:
            assert flags == 0, f"used.flags is {flags:#x}: with EVENT_IDX it must be 0 (2.7.10.2)"
            return self.ram.get(self.device + 4 + 8 * self.size, 2)
        assert flags in (0, 1), f"used.flags is {flags:#x} (2.7.10.2)"
        return NONE if flags else EVERY

    def publishing(self, done: list[Buffer]) -> list[tuple[int, int]]:
        places = [(self.device_idx + number) % self.size for number in range(len(done))]
        return [(self.device + 2, 2), *((self.device + 4 + 8 * place, 8) for place in places)]

    def published(self, done: list[Buffer]) -> None:
        for _ in done:
            self.used.append(self.device_idx)
            self.device_idx = (self.device_idx + 1) % 0x10000
        shown = self.ram.get(self.device + 2, 2)
        assert shown == self.device_idx, f"used.idx is {shown:#x} after {self.device_idx:#x} buffers"

    @property
    def wish_area(self) -> tuple[int, int]:
        return (self.device + 4 + 8 * self.size, 2) if self.event_idx else (self.device, 2)

    def _take_descriptor(self) -> int:
        return self.unused.pop(0 if self.in_order else self.rng.randrange(len(self.unused)))

    def _fill_table(self, table: int, elements: list[Element]) -> None:
        order = list(range(1, len(elements)))
        if not self.in_order and self.rng.random() < 0.5:
            self.rng.shuffle(order)
        order.insert(0, 0)
        for place, element in enumerate(elements):
            following = order[place + 1] if place + 1 < len(elements) else None
            self._describe(table, order[place], element, following)

    def _describe(self, table: int, index: int, element: Element, following: int | None) -> None:
        flags = WRITE * element.writable | NEXT * (following is not None)
        garbage = self.rng.randrange(1 << 16)  # next is not looked at without NEXT
        self._store(table, index, element.address, element.length, flags, garbage if following is None else following)

    def _store(self, table: int, index: int, address: int, length: int, flags: int, following: int) -> None:
        for offset, size, value in ((0, 8, address), (8, 4, length), (12, 2, flags), (14, 2, following)):
            self.ram.put(table + 16 * index + offset, size, value)
