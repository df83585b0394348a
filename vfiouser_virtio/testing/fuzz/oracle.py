"""Oracle of the fuzzer: what is wrong with a case, if anything.

===================  ==================================================================================================
finding              seen how
===================  ==================================================================================================
``bug``              a log record at ERROR with a traceback, or of a bug in the device; an unraisable exception; a task
                     that died
``hang``             a request without a reply, a buffer that does not come back, an event loop that stands still, a
                     PCI device that does not come to rest
``stall``            one step of a PCI device that took a second
``reply``            a reply without a request, out of order, of the wrong size or command
``closed``           the server hung up without saying what the client did wrong
``write``            guest memory changed outside of writable buffers and used rings; of a PCI device: where no memory
                     is mapped to be written, or after a reset
``leak``             more descriptors, mappings or tasks than before the client came
``broken``           the device does not work after a reset, or for the next client; a register of a PCI device has
                     another value than at first
===================  ==================================================================================================
"""

import gc
import logging
import os
import re
import sys
import traceback
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from types import TracebackType

import trio

from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.protocols.virtio.ring import (
    DESC_CODEC,
    PACKED_DESC_CODEC,
    PACKED_EVENT_SIZE,
    DescFlags,
    desc_size,
    packed_desc_size,
    used_size,
)
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds
from vfiouser_virtio.virtio import DeviceCore
from vfiouser_virtio.virtio.author_line import author_line
from vfiouser_virtio.virtio.virtqueue import Virtqueue

_LOGGER = logging.getLogger("vfiouser_virtio")
_PLACE = re.compile(r"\S+\.py:\d+")
_MAX_TABLE = 1024  # entries of an indirect table that are followed
# Plain ints: thousands of descriptors are looked at in each case, and an enum's member takes ten times as long.
_NEXT, _WRITE, _INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)


FEIGNED = frozenset({"hang", "stall", "broken", "leak"})
"""Kinds of findings that depend on time, or on what a thread has done by then."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Fault that was found. Two with the same ``kind`` and ``where`` are taken for the same bug."""

    kind: str
    what: str
    where: str = ""
    once: bool = False
    """It did not come again when its case was run again."""

    @property
    def key(self) -> tuple[str, str]:
        """What two findings of the same fault have in common."""
        return self.kind, self.where

    @property
    def counts(self) -> bool:
        """Whether it is one for sure: what a busy machine could feign must come twice."""
        return not self.once or self.kind not in FEIGNED

    def __str__(self) -> str:
        return f"{self.kind}{' (not reproduced)' if self.once else ''}: {self.what}"


class Found(Exception):
    """End of a case with a finding."""

    def __init__(self, kind: str, what: str, where: str = "") -> None:
        super().__init__(f"{kind}: {what}")
        self.finding = Finding(kind, what, where)


class Hung(BaseException):
    """Event loop that has not come back: raised by a timer's signal in whatever code is running."""


def of_exception(error: BaseException) -> Finding:
    """The finding that an exception is, by its innermost frame of ours."""
    text = "".join(traceback.format_exception(error))
    found = list(leaves(error))
    error = next((one for one in found if not isinstance(one, trio.Cancelled)), found[0])
    if isinstance(error, Found):
        return error.finding
    if isinstance(error, Hung) or "oracle.Hung" in text:
        return Finding("hang", "the event loop stands still\n" + text, "event loop")
    return Finding("bug", text, _where(error.__traceback__, error))


def _where(trace: TracebackType | None, error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if "vfiouser_virtio" in frame.filename]
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].name}" if frames else ""
    return f"{type(error).__name__} in {place}"


class LogWatch(logging.Handler):
    """Collection of what the package logs; a record at ERROR with a traceback is a bug."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.findings: list[Finding] = []
        self.hung_up = False
        """The server said why it closed a connection."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "connection closed" in text:
            self.hung_up = True
        if record.levelno < logging.ERROR:
            return
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            found = of_exception(error)
            at = author_line(error)
            where = f"{type(next(leaves(error))).__name__} at {at}" if at and found.kind == "bug" else found.where
            self.findings.append(Finding(found.kind, f"{text}\n{found.what}", where))
        elif "a bug in the device" in text:  # one that needs no traceback: the line has its place
            place = _PLACE.search(text)
            self.findings.append(Finding("bug", text, place[0] if place else "the device"))

    def _unraisable(self, event: "sys.UnraisableHookArgs") -> None:
        what = f"{event.err_msg or 'ignored exception'}: {event.exc_value!r} in {event.object!r}"
        self.findings.append(Finding("bug", what, "unraisable"))

    def __enter__(self) -> "LogWatch":
        self._before = _LOGGER.propagate, _LOGGER.level, sys.unraisablehook
        _LOGGER.propagate = False
        _LOGGER.setLevel(logging.WARNING)
        sys.unraisablehook = self._unraisable
        _LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _LOGGER.removeHandler(self)
        _LOGGER.propagate, level, sys.unraisablehook = self._before
        _LOGGER.setLevel(level)


@cache
def _open_what_is_kept() -> None:
    """From its first interrupt on a process keeps one descriptor (`eventfds`): it is no leak."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    signal(fd)
    os.close(fd)


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of this process: descriptors, mappings of shared memory, GiB of address space, trio tasks."""

    fds: int
    mappings: int
    address_space: int
    tasks: int

    @staticmethod
    def now() -> "Resources":
        _open_what_is_kept()
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        with open("/proc/self/maps", "rb") as maps:
            mappings = maps.read().count(b"/memfd:")
        tasks = trio.lowlevel.current_statistics().tasks_living
        return Resources(len(os.listdir("/proc/self/fd")), mappings, pages >> 18, tasks)

    def check(self, what: str) -> None:
        """Raise Found if there is more of anything than there was when this was taken."""
        grown = self.grown()
        if grown:
            raise Found("leak", f"{what}: {grown}", grown.split(" ")[0])

    def grown(self) -> str:
        """What there is more of now."""
        if not self.more():
            return ""
        gc.collect()  # an exception's frames in a cycle may hold a view of memory, and that its window
        return self.more()

    def more(self) -> str:
        """What there is more of now, of which some may only wait for Python's collection."""
        now = Resources.now()
        return ", ".join(
            f"{name} {getattr(self, name)} -> {getattr(now, name)}"
            for name in self.__slots__
            if getattr(now, name) > getattr(self, name)
        )


class Bounds(StoreBounds):
    """Bytes of guest memory that a virtio device may store to: the more the longer a case runs, until `forget`."""

    def __init__(self, ram: FuzzRam, core: DeviceCore, *, takes_pages: bool = False) -> None:
        """``takes_pages``: a balloon, which may turn to zeros whatever page is named in the bytes that it is sent."""
        super().__init__(ram)
        self._takes_pages = takes_pages
        self._core = core
        self._ranges: set[tuple[int, int]] = set()
        self._unions: list[tuple[int, int]] | None = []
        """Where their unions begin and end, in order; None: to be made."""
        self._read: list[tuple[int, int, bytes]] = []
        self._noted: dict[int, list[tuple[int, int, bytes]]] = {}
        """By queue, what was read at its last look: (address, size, bytes). While that is so, there is nothing new."""

    def note(self) -> None:
        """Take in the rings and chains as they are in memory now. Generous: whatever a descriptor names is allowed."""
        for queue in self._core.queues:
            if queue.enabled and not self._is_noted(queue):
                self._noted[queue.index] = self._read = []
                if queue.features.packed:
                    self._add(queue.desc, packed_desc_size(queue.size))
                    self._add(queue.device, PACKED_EVENT_SIZE)
                    self._note_descriptors(queue.desc, queue.size)
                else:
                    self._add(queue.device, used_size(queue.size))
                    self._note_chains(queue.desc, queue.driver, queue.size)

    def _is_noted(self, queue: Virtqueue) -> bool:
        """Whether all that its ranges follow from is as it was: most steps change one queue, or none."""
        packed, known = queue.features.packed, self._noted.get(queue.index)
        if not known or known[0][:2] != (queue.desc, (packed_desc_size if packed else desc_size)(queue.size)):
            return False
        if not packed and (len(known) < 2 or known[1][:2] != (queue.driver + 4, 2 * queue.size)):
            return False
        device = (queue.device, PACKED_EVENT_SIZE if packed else used_size(queue.size))
        return device in self._ranges and all(self._ram.read(at, size) == data for at, size, data in known)

    def _look(self, address: int, size: int) -> bytes:
        data = self._ram.read(address, size)
        self._read.append((address, size, data))
        return data

    def _add(self, address: int, length: int) -> None:
        if (address, length) not in self._ranges:
            self._ranges.add((address, length))
            self._unions = None

    def allow(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Take in (address, length) of a chain's writable buffers: less than `note` has to look at."""
        for address, length in ranges:
            self._add(address, length)

    def _note_descriptors(self, desc: int, size: int) -> None:
        """Of a packed ring: all that there are, whether available or not."""
        for address, length, _, flags in PACKED_DESC_CODEC.iter_unpack(self._look(desc, packed_desc_size(size))):
            if flags & _INDIRECT:
                self._note_table(address, length, flags_at=3)
            elif flags & _WRITE:
                self._add(address, length)

    def _note_chains(self, desc: int, avail: int, size: int) -> None:
        table = self._look(desc, desc_size(size))
        ring = memoryview(self._look(avail + 4, 2 * size)).cast("H")
        seen: set[int] = set()
        for head in ring:
            index = head
            while index < size and index not in seen:
                seen.add(index)
                address, length, flags, index = DESC_CODEC.unpack_from(table, 16 * index)
                if flags & _INDIRECT:
                    self._note_table(address, length, flags_at=2)
                elif flags & _WRITE:
                    self._add(address, length)
                if not flags & _NEXT:
                    break

    def _note_table(self, address: int, length: int, *, flags_at: int) -> None:
        count = min(length // DESC_CODEC.size, _MAX_TABLE)
        for entry in DESC_CODEC.iter_unpack(self._look(address, count * DESC_CODEC.size)):
            if entry[flags_at] & _WRITE:
                self._add(*entry[:2])

    def forget(self) -> None:
        """The device has been reset: it may store nothing at all."""
        super().forget()
        self._ranges.clear()
        self._noted.clear()
        self._unions = []

    def check_store(self, address: int, data: bytes) -> None:
        """Raise Found if the device may not store these bytes there."""
        if self.blind:
            return
        missing = self._missing(address, address + len(data))
        if missing is not None:
            self.note()  # a descriptor that was written since the last look
            missing = self._missing(address, address + len(data))
        while missing is not None:
            start, end = missing
            rest = data[start - address :]
            if self._takes_pages and (zeros := len(rest) - len(rest.lstrip(b"\0"))):
                missing = self._missing(start + zeros, address + len(data))
                continue
            stored = data[start - address : end - address][:32].hex()
            raise Found("write", f"{end - start:#x} bytes stored at {start:#x}, which is in no buffer: {stored}")

    def _missing(self, start: int, end: int) -> tuple[int, int] | None:
        """The first part of a range that is in none of what may be stored to, up to the end of the range."""
        if self._unions is None:
            self._unions = _united(self._ranges)
        at = bisect_right(self._unions, start, key=itemgetter(0)) - 1
        if at >= 0:
            start = max(start, self._unions[at][1])
        return (start, end) if start < end else None


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Begin and end of what (address, length) ranges cover together; between two of them there is a gap."""
    unions: list[tuple[int, int]] = []
    for address, length in sorted(ranges):
        if unions and address <= unions[-1][1]:
            unions[-1] = unions[-1][0], max(unions[-1][1], address + length)
        else:
            unions.append((address, address + length))
    return unions
