"""Floor of a block read from a RAM disk over a split ring, in pure Python: one loop over a burst, tuples only.

Three linked descriptors (header, data, status) are unpacked at once and checked, the header is parsed, the data copied,
the status and the used elements are stored. No driver, no other CPU, no object, nothing that can be changed.
"""

import mmap
import struct
import time

from vfiouser_virtio.protocols.virtio.blk import REQUEST_HEADER_CODEC
from vfiouser_virtio.protocols.virtio.ring import DescFlags

ENTRIES = 512
_AVAIL = 16 * ENTRIES
_USED = (_AVAIL + 4 + 2 * ENTRIES + 4 + 3) & ~3
_HEADERS, _STATUS, _DATA = 1 << 16, 1 << 17, 1 << 18
_ROOM = 128 << 10  # for the data of one request
_DISK_SIZE = 16 << 20
_THREE = struct.Struct("<QIHHQIHHQIHH")


def requests_per_second(burst: int, size: int, seconds: float) -> float:
    """So many reads of ``size`` bytes are served in bursts, over and over, for at least so long."""
    ram, disk = memoryview(mmap.mmap(-1, _DATA + burst * _ROOM)), memoryview(mmap.mmap(-1, _DISK_SIZE))
    _lay_out(ram, burst, size)
    used, index = ram[_USED : _USED + 4 + 8 * ENTRIES].cast("I"), ram[_USED : _USED + 4].cast("H")
    rounds = 0
    begin = now = time.perf_counter()
    while now - begin < seconds:
        for _ in range(max(1, 256 // burst)):
            _serve(ram, disk, used, burst)
            rounds += 1
            index[1] = rounds & 0xFFFF
        now = time.perf_counter()
    return rounds * burst / (now - begin)


def _lay_out(ram: memoryview, burst: int, size: int) -> None:
    to_read, to_fill = int(DescFlags.NEXT), int(DescFlags.NEXT | DescFlags.WRITE)
    for i in range(burst):
        header = (_HEADERS + 16 * i, 16, to_read, 3 * i + 1)
        data = (_DATA + _ROOM * i, size, to_fill, 3 * i + 2)
        _THREE.pack_into(ram, 48 * i, *header, *data, _STATUS + i, 1, int(DescFlags.WRITE), 0)
        REQUEST_HEADER_CODEC.pack_into(ram, _HEADERS + 16 * i, 0, 0, size // 512 * i)


def _serve(ram: memoryview, disk: memoryview, used: memoryview, burst: int) -> None:
    unpack, parse, end, capacity = _THREE.unpack_from, REQUEST_HEADER_CODEC.unpack_from, len(ram), len(disk)
    done: list[int] = []
    for head in range(0, 3 * burst, 3):
        a0, l0, f0, n0, a1, l1, f1, n1, a2, l2, f2, _ = unpack(ram, 16 * head)
        if f0 != 1 or f1 != 3 or f2 != 2 or n0 != head + 1 or n1 != head + 2 or l0 != 16 or l2 != 1:
            raise AssertionError("the general way")
        if a0 + 16 > end or a1 + l1 > end or a2 >= end:
            raise AssertionError("not in memory")
        kind, _, sector = parse(ram, a0)
        offset = sector << 9
        if kind or l1 & 511 or offset + l1 > capacity:
            raise AssertionError("the general way")
        ram[a1 : a1 + l1] = disk[offset : offset + l1]
        ram[a2] = 0
        done += (head, l1 + 1)
    used[1 : 1 + len(done)] = memoryview(struct.pack(f"<{len(done)}I", *done)).cast("I")
