"""Benchmark of the ring engines alone: take chains, look at their segments, complete and publish them.

Through the objects that a queue uses, in memory that is mapped as a client's is, all checks on. The driver's part is
timed as well, and is next to nothing: what it makes available was laid out before. The C program does the same work
in C; it says how much of a figure is the language.
"""

import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time_ns
from typing import NamedTuple

from benchmarks.compiler import compile_c
from benchmarks.measure import Benchmark, Options, Row, Target, at_least, in_turn
from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, RawRing, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing, linked
from vfiouser_virtio.vring import Ring, RingFeatures, make_ring, ring_areas

_RAM, _RAM_SIZE = 0x10_0000, 0x40_0000
_DESC, _DRIVER, _DEVICE = _RAM, _RAM + 0x1_0000, _RAM + 0x2_0000
_TABLES, _DATA = _RAM + 0x8_0000, _RAM + 0x10_0000
# One buffer to be filled; and what a disk gets for a read: a header, a buffer, a status. (offset, length, flags)
_ONE = ((0, 4096, WRITE),)
_THREE = ((0, 16, 0), (16, 2048, WRITE), (4000, 1, WRITE))

SHAPES = {"1 descriptor": "1", "3 descriptors": "3", "indirect, 3 entries": "indirect"}
BURSTS = (1, 16, 128)
TARGETS: dict[tuple[str, str, int], Target] = {
    ("split", "1", 16): at_least(1.5),
    ("split", "1", 1): at_least(0.45),
    ("split", "indirect", 16): at_least(0.9),
    ("packed", "1", 16): at_least(1.0),
}
# A figure is the best of some slices, each of about 3 ms: other programs make code slower, never faster.
_SLICES, _SLICE_CHAINS = 20, 3000


class RingLoad(NamedTuple):
    """Ring of a device, and the driver that feeds it."""

    ring: Ring
    offer: Callable[[int], None]
    """Makes so many chains available."""


def load(kind: str, shape: str, *, event_idx: bool, in_order: bool = False) -> RingLoad:
    """A split or packed ring with all its buffers laid out, of a shape out of `SHAPES`."""
    packed = kind == "packed"
    features = RingFeatures(packed=packed, indirect=True, event_idx=event_idx, in_order=in_order)
    memory = GuestMemory()
    ram = SharedMemory(_RAM_SIZE, address=_RAM)
    assert ram.fd is not None
    memory.map(_RAM, _RAM_SIZE, readable=True, writable=True, fd=os.dup(ram.fd), offset=0)
    return (_packed if packed else _split)(memory, ram, shape, features)


def _bound(memory: GuestMemory, size: int, features: RingFeatures) -> Ring:
    ring = make_ring(size, memory, features)
    areas = ring_areas(size, features, _DESC, _DRIVER, _DEVICE)
    ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
    return ring


def _segments(driver: RawRing, shape: str, chain: int) -> list[Segment]:
    """What stands in the ring for a chain: its buffers, or the table with them, which is stored here."""
    base = _DATA + 4096 * chain
    segments = [(base + offset, length, flags) for offset, length, flags in (_ONE if shape == "1" else _THREE)]
    if shape != "indirect":
        return segments
    table = driver.table(segments)
    driver.ram.write(_TABLES + 64 * chain, table)
    return [(_TABLES + 64 * chain, len(table), INDIRECT)]


def _split(memory: GuestMemory, ram: SharedMemory, shape: str, features: RingFeatures) -> RingLoad:
    each, size, chains = (3, 512, 128) if shape == "3" else (1, 256, 256)
    ring = _bound(memory, size, features)
    driver = RawSplitRing(ram, size, (_DESC, _DRIVER, _DEVICE))
    for chain in range(chains):
        places = range(each * chain, each * chain + each)
        for place, descriptor in zip(places, linked(_segments(driver, shape, chain), places), strict=True):
            driver.describe(place, descriptor)
    avail = memory.writable(_DRIVER, 4 + 2 * size)[0].cast("H")
    for slot in range(size):
        avail[2 + slot] = each * (slot % chains)

    def offer(count: int) -> None:
        avail[1] = (avail[1] + count) & 0xFFFF

    return RingLoad(ring, offer)


def _packed(memory: GuestMemory, ram: SharedMemory, shape: str, features: RingFeatures) -> RingLoad:
    each, size = (3, 384) if shape == "3" else (1, 256)
    ring = _bound(memory, size, features)
    driver = RawPackedRing(ram, size, (_DESC, _DRIVER, _DEVICE))
    lap: dict[int, bytes] = {}
    for wrap in (1, 0):
        for chain in range(size // each):
            driver.write(_segments(driver, shape, chain), [chain] * each)
        lap[wrap] = driver.descriptors(0, size)
        driver.skip_used(size)
    ram.write(_DESC, bytes(len(lap[0])))
    desc = memory.writable(_DESC, 16 * size)[0]
    at, wrap = 0, 1

    def offer(count: int) -> None:
        nonlocal at, wrap
        left = 16 * each * count
        while left:
            stop = min(at + left, 16 * size)
            desc[at:stop] = lap[wrap][at:stop]
            left -= stop - at
            at = stop
            if at == 16 * size:
                at, wrap = 0, 1 - wrap

    return RingLoad(ring, offer)


def serve(ring: Ring, offer: Callable[[int], None], shape: str, burst: int, bursts: int) -> None:
    """What is measured."""
    for _ in range(bursts):
        offer(burst)
        if shape == "1":
            for chain in ring.pop(burst):
                _ = chain.writable.segments
                chain.complete(4096)
        else:
            for chain in ring.pop(burst):
                _ = chain.readable.segments
                _ = chain.writable.segments
                chain.complete(2049)
        ring.publish()
        ring.request_notification()


def _measure(of: RingLoad, shape: str, burst: int, slices: int) -> float:
    """Million chains per second of process CPU time."""
    bursts = max(1, _SLICE_CHAINS // burst)
    best = min(_timed(of, shape, burst, bursts) for _ in range(slices))
    return 1e3 * bursts * burst / best


def _timed(of: RingLoad, shape: str, burst: int, bursts: int) -> int:
    start = process_time_ns()
    serve(of.ring, of.offer, shape, burst, bursts)
    return process_time_ns() - start


def _measure_c(program: Path, kind: str, shape: str, burst: int, chains: int) -> float:
    command = [str(program), f"{kind}-{shape}", str(burst), str(chains)]
    return 1e3 / float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run(options: Options) -> list[Row]:
    """Each kind, shape and burst, with EVENT_IDX; the plainest also without."""
    logging.getLogger("vfiouser_virtio.memory").setLevel(logging.ERROR)
    slices, chains = (1, 20_000) if options.quick else (_SLICES, 5_000_000)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        program = compile_c("rings", Path(folder))
        if program is None:
            options.note("no C compiler: there is no C loop to compare with")
        for kind in ("split", "packed"):
            for name, shape in SHAPES.items():
                for burst in BURSTS:
                    for event_idx in (True, False) if shape == "1" and burst == 16 else (True,):
                        metric = f"{kind}, {name}, burst {burst}{'' if event_idx else ', no EVENT_IDX'}"
                        options.progress(metric)
                        of = load(kind, shape, event_idx=event_idx)
                        contenders: dict[str, Callable[[], float]] = {
                            "ours": partial(_measure, of, shape, burst, slices)
                        }
                        if program and event_idx:
                            contenders["C loop"] = partial(_measure_c, program, kind, shape, burst, chains)
                        figures = in_turn(contenders, options.rounds)
                        target = TARGETS.get((kind, shape, burst)) if event_idx else None
                        ours = figures.pop("ours")
                        targets = {"": target} if target else {}
                        rows.append(Row(metric=metric, unit="M/s", ours=ours, theirs=figures, targets=targets))
    return rows


BENCHMARK = Benchmark(name="rings", summary="the ring engines alone, chains per second", run=run)
