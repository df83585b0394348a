"""Steps of a fuzz case, carried out: each method is one kind of step, its parameters are the keys of the step."""

from collections.abc import Sequence
from itertools import count

from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.deadline import Deadline
from vfiouser_virtio.testing.fuzz.driver import BUFFER_TIMEOUT, FuzzDriver
from vfiouser_virtio.testing.fuzz.message_performer import MessagePerformer
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Found
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.targets import FuzzTarget
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.transports.pci import DEVICE, VIRTIO_BAR
from vfiouser_virtio.vfio_device import VfioDevice

# Commands after which buffers may stay with the device for good reasons: memory that is gone, a device that was reset.
_DISTURBING = {Command.DMA_UNMAP, Command.DEVICE_RESET, Command.REGION_WRITE, Command.REGION_WRITE_MULTI}


_NEEDS_RESET = int(DeviceStatus.NEEDS_RESET)
# Steps that change no ring but in ways that they tell the oracle of themselves.
_NOTED = frozenset({"request", "kick", "settle", "pause", "sleep"})


class Performer(MessagePerformer[FuzzDriver, Bounds]):
    """Part of one client in a case of a virtio device."""

    def __init__(
        self,
        client: FuzzClient,
        ram: FuzzRam,
        bounds: Bounds,
        case: Case,
        target: FuzzTarget,
        function: VfioDevice | None = None,
    ) -> None:
        """``function``: where registers are accessed without the socket."""
        super().__init__(client, ram, case, FuzzDriver(client, ram, bounds, case.memory, function), bounds)
        self.target = target
        self._disturbed = False
        """Something was done after which the device may keep buffers until it is brought up again."""

    def performed(self, name: str) -> None:
        """A step has been done."""
        if name not in _NOTED:
            self.bounds.note()

    def disturbed(self, command: int, region: int | None = None, offset: int = 0) -> None:
        """What its configuration is told is no reason to keep buffers."""
        if command == Command.REGION_WRITE and region is not None:
            self._disturbed |= region != VIRTIO_BAR or offset < DEVICE
        else:
            self._disturbed |= command in _DISTURBING

    async def leave_quiet(self) -> None:
        """Reset the device before the client goes."""
        await self.driver.reset()

    # ---- the device ----------------------------------------------------------------------------------------------

    async def do_bring_up(self, size: int = 16, features: int = (1 << 128) - 1) -> None:
        """From any state to DRIVER_OK."""
        self.client.answers.clear()
        await self.client.answer_late()
        await self.have_memory()
        await self.driver.bring_up(size=size, features=features)
        self._disturbed = self._unmapped = False
        # A long packet would wait for the whole window of messages, of which one that is not answered keeps its part.
        self.client.lied = self.client.silent

    async def do_check(self) -> None:
        """The device works: from whatever state it is in to a good request."""
        client = self.client
        client.answers.clear()
        await client.answer_late()
        await self.driver.unmap_all()
        await self.driver.map()
        await self.driver.bring_up()
        if client.closed.is_set():
            return
        try:
            await self.target.works(self.driver)
        except Found as found:
            if not client.closed.is_set():
                raise Found("broken", f"after a reset: {found.finding.what}", found.finding.kind) from found
        self.bounds.check()

    async def do_kick(self, queue: int) -> None:
        """A notification."""
        await self.driver.kick(queue)

    async def do_request(
        self, queue: int, out: Sequence[str] = (), room: Sequence[int] = (), indirect: bool = False, kick: bool = True
    ) -> None:
        """A chain that is well-formed, whatever its contents."""
        if self.driver.offer(queue, [bytes.fromhex(data) for data in out], room, indirect=indirect) and kick:
            await self.driver.kick(queue)

    async def do_settle(self) -> None:
        """Wait until the device has done what it can, and look at what it did."""
        for ring in self.driver.rings:
            if ring.pending:
                await self.driver.kick(ring.index)
        limit = Deadline(BUFFER_TIMEOUT)
        for looks in count():
            if not self._owed() or limit.over():
                break
            status = await self.driver.common("device_status")
            if status & _NEEDS_RESET or self.client.closed.is_set():
                break
            await self.driver.let_work(limit, looks)
        owed = self._owed()
        broken = owed and await self.driver.common("device_status") & _NEEDS_RESET
        if owed and not broken and not self.client.closed.is_set():
            raise Found("hang", f"{owed} does not come back within {BUFFER_TIMEOUT} s", "buffer")
        self.bounds.check()

    def _owed(self) -> str:
        """A buffer that must come back, if there is one."""
        if self._disturbed or self._unmapped or self.client.lied or not self.client.in_step:
            return ""
        for ring in self.driver.rings:
            self.driver.collect(ring)
            if ring.pending and not ring.hostile and not self.target.keeps(ring.index, self.driver.features):
                return f"queue {ring.index}: buffer {min(ring.pending):#x}"
        return ""

    # ---- rings, byte by byte -------------------------------------------------------------------------------------

    async def do_poke(self, at: int, data: str) -> None:
        """Store to RAM."""
        self.ram.write(at, bytes.fromhex(data))
        self._hostile()

    async def do_table(self, at: int, entries: Sequence[Sequence[int]]) -> None:
        """Descriptors anywhere: (address, length, flags, next) each."""
        self.ram.write(at, b"".join(DESC_CODEC.pack(*entry) for entry in entries))
        self._hostile()

    async def do_descriptors(self, queue: int, first: int, entries: Sequence[Sequence[int]]) -> None:
        """Descriptors in a queue's table, from index ``first`` on."""
        for ring in self.driver.rings[queue : queue + 1]:
            for index, entry in enumerate(entries, first):
                self.ram.write(ring.desc + 16 * (index % ring.size), DESC_CODEC.pack(*entry))
        self._hostile(queue)

    async def do_avail(self, queue: int, heads: Sequence[int], jump: int = 0, flags: int = 0) -> None:
        """Make heads of a split ring available, and move the index ``jump`` further than that."""
        for ring in self.driver.rings[queue : queue + 1]:
            self._hostile(queue)
            if isinstance(ring, RawSplitRing):
                ring.set_avail_flags(flags)
                ring.offer(*heads, jump=jump)
                self.bounds.note()

    async def do_packed(self, queue: int, entries: Sequence[Sequence[int]], raw: bool = False) -> None:
        """Descriptors of a packed ring, (address, length, id, flags) each, where its next ones belong."""
        for ring in self.driver.rings[queue : queue + 1]:
            self._hostile(queue)
            if isinstance(ring, RawPackedRing):
                ring.store([(address, length, name, flags) for address, length, name, flags in entries], raw=raw)
                self.bounds.note()

    async def do_used_event(self, queue: int, value: int) -> None:
        """After what the driver wants an interrupt."""
        for ring in self.driver.rings[queue : queue + 1]:
            ring.set_event(value)

    async def do_suspend(self) -> None:
        """SUSPEND, and on again."""
        if self.driver.has(Feature.SUSPEND):
            await self.driver.suspend()

    def _hostile(self, queue: int | None = None) -> None:
        for ring in self.driver.rings:
            ring.hostile |= queue in (None, ring.index)
        self.bounds.note()
