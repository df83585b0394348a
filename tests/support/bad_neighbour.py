"""Device that harms its neighbours, its client or its host, in many ways: the process oracle has a word for each.

It is the file of a device for ``serve --device bad_neighbour.py:BadNeighbour,how=…``; several ways are joined by ``+``.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

from vfiouser_virtio import Device, queue

_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p


def mapping(name: str) -> int:
    """Where a memfd is mapped here."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"/memfd:{name}" in line:
            return int(line.split("-")[0], 16)
    raise AssertionError(f"{name} is not mapped")


class BadNeighbour(Device):
    """It answers each request, and does what it is for at the first few of them."""

    device_id = 44  # the neighbour's is the entropy device, and this one is to be called something else
    requestq = queue()

    def __init__(self, how: str) -> None:
        super().__init__()
        self._ways = how.split("+")
        self._kept: list[object] = []
        self._requests = 0
        while "spins_at_the_start" in self._ways:
            pass

    async def run(self) -> None:
        async for chain in self.requestq:
            for way in self._ways:
                getattr(self, way)()
            self._requests += 1
            chain.complete()

    def nothing(self) -> None:
        """Good."""

    def dies(self) -> None:
        os._exit(3)

    def stalls(self) -> None:
        if self._requests < 3:
            time.sleep(1.0)  # more than waits for a CPU, which do not count, take on a busy machine

    def stops(self) -> None:
        time.sleep(3600)

    def ignores_the_end(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ["STUCK"] = "1"

    def overwrites_a_neighbour(self) -> None:
        ctypes.memset(mapping("guest-ram") + 0x8_0000, 0, 1)

    def keeps_memory(self) -> None:
        """A second mapping of the client's memory, which stays (mremap(2): an old size of 0)."""
        if not self._kept:
            copy = _libc.mremap(ctypes.c_void_p(mapping("fuzz-0-0")), 0, _PAGE, 1)
            assert copy not in (None, ctypes.c_void_p(-1).value)
            self._kept.append(copy)

    def takes_no_clients(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def keeps_descriptors(self) -> None:
        self._kept += [os.dup(0) for _ in range(50)]

    def keeps_bytes(self) -> None:
        if self._requests == 0:
            self._kept.append(bytearray(b"x") * (256 << 20))

    def floods_the_log(self) -> None:
        os.write(2, (b"words " * 12 + b"\n") * 10_000)

    def commands_a_terminal(self) -> None:
        print("\x1b[2J cleared", file=sys.__stderr__)

    def forges_a_line(self) -> None:
        print("all is well\nforged-line", file=sys.__stderr__)

    def shows_a_traceback(self) -> None:
        print("Traceback (most recent call last):\n  and so on", file=sys.__stderr__)

    def writes_to_a_file(self) -> None:
        Path("victim").write_text("mine now")
