"""Driver of an NVMe controller in this process, which can also do what none should: for examples/pci/nvme.py.

Written from the specification, apart from the device (NVM Express Base 2.0c, §3.1.3, §3.3, §5). Its RAM::

    0x01000 admin submission queue    0x03000 … I/O submission queues, a page each     0x10000 … data
    0x02000 admin completion queue    0x08000 … I/O completion queues
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import trio
from support.in_process_driver import InProcessDriver

CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30
ENABLE = 0x0046_0001
READY, FATAL = 1, 2
DATA = 0x10000
PAGE = 4096


class Completion(NamedTuple):
    """What the driver finds in a completion queue; ``status`` without DNR."""

    result: int
    sq_head: int
    sq: int
    cid: int
    status: int


@dataclass
class Pair:
    """Submission queue, and the completion queue for it."""

    number: int
    size: int
    sq: int
    cq: int
    tail: int = 0
    head: int = 0
    phase: int = 1
    done: list[Completion] = field(default_factory=list)


class NvmeDriver:
    """Driver on ``driver``'s accesses."""

    def __init__(self, driver: InProcessDriver, *, admin_size: int = 16) -> None:
        self.driver = driver
        self.admin = Pair(0, admin_size, 0x1000, 0x2000)
        self._cid = 0

    async def enable(self, *, asq: int = 0x1000, acq: int = 0x2000, cc: int = ENABLE) -> None:
        """Set the admin queue up, and the controller ready."""
        self.driver.write(AQA, (self.admin.size - 1) * 0x10001)
        self.driver.write(ASQ, asq, 8)
        self.driver.write(ACQ, acq, 8)
        self.driver.write(CC, cc)
        await self.driver.settle()

    async def disable(self) -> None:
        """Controller reset; queues of before are gone."""
        self.driver.write(CC, 0x0046_0000)
        await self.driver.settle()
        self.driver.put(0x1000, bytes(0xF000))
        self.admin = Pair(0, self.admin.size, 0x1000, 0x2000)

    def submit(
        self, pair: Pair, opcode: int, *cdw10: int, nsid: int = 0, prp1: int = 0, prp2: int = 0, flags: int = 0
    ) -> int:
        """Put a command into the queue, without a word to the controller; returns its identifier."""
        self._cid = (self._cid + 1) & 0xFFFF
        words = (*cdw10, 0, 0, 0, 0, 0, 0)[:6]
        entry = struct.pack("<BBHI16xQQ6I", opcode, flags, self._cid, nsid, prp1, prp2, *words)
        self.driver.put(pair.sq + 64 * pair.tail, entry)
        pair.tail = (pair.tail + 1) % pair.size
        return self._cid

    def ring(self, pair: Pair) -> None:
        """The doorbell of the submission queue."""
        self.driver.write(0x1000 + 8 * pair.number, pair.tail)

    def reap(self, pair: Pair, *, acknowledge: bool = True) -> list[Completion]:
        """What the controller has completed since the last call."""
        found = []
        while True:
            result, _, sq_head, sq, cid, status = struct.unpack(
                "<IIHHHH", self.driver.get(pair.cq + 16 * pair.head, 16)
            )
            if status & 1 != pair.phase:
                break
            found.append(Completion(result, sq_head, sq, cid, status >> 1 & 0x7FF))
            pair.head = (pair.head + 1) % pair.size
            if not pair.head:
                pair.phase ^= 1
        if acknowledge and found:
            self.driver.write(0x1004 + 8 * pair.number, pair.head)
        pair.done += found
        return found

    async def do(
        self, pair: Pair, opcode: int, *cdw10: int, nsid: int = 0, prp1: int = 0, prp2: int = 0, flags: int = 0
    ) -> Completion:
        """One command, and its completion."""
        cid = self.submit(pair, opcode, *cdw10, nsid=nsid, prp1=prp1, prp2=prp2, flags=flags)
        self.ring(pair)
        await self.driver.settle()
        with trio.fail_after(120):  # a thread, or the kernel, may be at it
            while not (found := self.reap(pair)):
                await trio.sleep(0.001)
        [done] = found
        assert (done.cid, done.sq) == (cid, pair.number)
        return done

    async def command(self, opcode: int, *cdw10: int, nsid: int = 0, prp1: int = 0, prp2: int = 0) -> Completion:
        """One command of the admin queue."""
        return await self.do(self.admin, opcode, *cdw10, nsid=nsid, prp1=prp1, prp2=prp2)

    async def create(self, number: int = 1, size: int = 16, *, vector: int = 0) -> Pair:
        """A pair of I/O queues."""
        pair = Pair(number, size, 0x3000 + PAGE * (number - 1), 0x8000 + PAGE * (number - 1))
        where = number | (size - 1) << 16
        assert (await self.command(0x05, where, 3 | vector << 16, prp1=pair.cq)).status == 0
        assert (await self.command(0x01, where, 1 | number << 16, prp1=pair.sq)).status == 0
        return pair

    async def identify(self, which: int, *, nsid: int = 0) -> bytes:
        """An Identify data structure."""
        assert (await self.command(0x06, which, nsid=nsid, prp1=DATA)).status == 0
        return self.driver.get(DATA, PAGE)

    async def io(
        self, pair: Pair, opcode: int, block: int, count: int, *, prp1: int = DATA, prp2: int = 0, more: int = 0
    ) -> int:
        """A read or write of ``count`` blocks; its status."""
        words = block & 0xFFFF_FFFF, block >> 32, count - 1 | more
        return (await self.do(pair, opcode, *words, nsid=1, prp1=prp1, prp2=prp2)).status
