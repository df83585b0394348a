"""Steps of a fuzz case, carried out: each method is one kind of step, its parameters are the keys of the step."""

import struct
from collections.abc import Sequence
from typing import Any

import trio
import trio.testing

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.testing.fuzz import fd_kinds, message_step
from vfiouser_virtio.testing.fuzz.case import Case, Memory, Step
from vfiouser_virtio.testing.fuzz.client import FuzzClient, hello
from vfiouser_virtio.testing.fuzz.driver import BUFFER_TIMEOUT, FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Found
from vfiouser_virtio.testing.fuzz.ram import PIECES, FuzzRam
from vfiouser_virtio.testing.fuzz.targets import FuzzTarget
from vfiouser_virtio.testing.raw.client import raw_message
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.transports.pci import DEVICE, VIRTIO_BAR
from vfiouser_virtio.vfio_device import VfioDevice

# Commands after which buffers may stay with the device for good reasons: memory that is gone, a device that was reset.
_DISTURBING = {Command.DMA_UNMAP, Command.DEVICE_RESET, Command.REGION_WRITE, Command.REGION_WRITE_MULTI}


# Steps that change no ring but in ways that they tell the oracle of themselves.
_NOTED = frozenset({"request", "kick", "settle", "pause", "sleep"})


class Performer:
    """Part of one client in a case."""

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
        self.client = client
        self.ram = ram
        self.bounds = bounds
        self.target = target
        self.driver = FuzzDriver(client, ram, bounds, case.memory, function)
        self._twin = case.twin
        self._disturbed = False
        """Something was done after which the device may keep buffers until it is brought up again."""
        self._unmapped = False
        """Likewise, until `do_map`: a buffer in flight comes back then, or the device needs a reset."""

    async def perform(self, step: Step) -> None:
        """One step. Raises Found; AttributeError or TypeError for a step that is none."""
        if self.client.closed.is_set():
            return
        parameters = dict(step)
        name = parameters.pop("do")
        await getattr(self, "do_" + name)(**parameters)
        if name not in _NOTED:
            self.bounds.note()

    # ---- messages ------------------------------------------------------------------------------------------------

    async def do_hello(self) -> None:
        """VERSION, then all memory."""
        await self.client.call(Command.VERSION, hello(twin=self._twin))
        await self.driver.map()

    async def do_message(
        self,
        command: int | str,
        fds: Sequence[str] = (),
        size: int | None = None,
        flags: int = 0,
        id: int = 1,  # noqa: A002 - the name of the field
        error: int = 0,
        cuts: Sequence[int] = (),
        wait: bool = True,
        **content: Any,
    ) -> None:
        """One message of any kind; ``size`` if it is to lie, ``cuts`` where it is cut into pieces.

        ``content`` is what `message_step.payload` takes.
        """
        payload, command = message_step.payload(command, **content), message_step.command_number(command)
        self._disturbed |= command in _DISTURBING
        sent = [fd_kinds.make(kind, self.ram.fd) for kind in fds]
        try:
            message = raw_message(command, payload, message_id=id, flags=flags, error=error, size=size)
            asked = await self.client.send(message, sent, cuts)
        finally:
            close_all(sent)
        if wait and not flags & MessageFlags.NO_REPLY:
            await self.client.result(asked)

    async def do_raw(self, data: str, fds: Sequence[str] = ()) -> None:
        """Bytes that need not be a message."""
        sent = [fd_kinds.make(kind, self.ram.fd) for kind in fds]
        try:
            await self.client.send(bytes.fromhex(data), sent)
        finally:
            close_all(sent)

    async def do_read(self, region: int, offset: int, count: int) -> None:
        """REGION_READ."""
        await self.client.call(Command.REGION_READ, struct.pack("<QII", offset, region, count))

    async def do_write(self, region: int, offset: int, data: str, posted: bool = False) -> None:
        """REGION_WRITE, as a request or posted."""
        self._disturbed |= region != VIRTIO_BAR or offset < DEVICE
        payload = bytes.fromhex(data)
        body = struct.pack("<QII", offset, region, len(payload)) + payload
        if posted:
            self.client.post(Command.REGION_WRITE, body)
            await self.client.flush()
        else:
            await self.client.call(Command.REGION_WRITE, body)

    async def do_answers(self, how: Sequence[str]) -> None:
        """How to answer the next DMA requests."""
        self.client.answers.extend(how)

    async def do_answer_late(self) -> None:
        """Send the DMA replies that were held back."""
        await self.client.answer_late()

    async def do_unmap(self, pieces: Sequence[int] | None = None) -> None:
        """Pieces of the RAM go, or all memory."""
        self._unmapped = True
        if pieces is None:
            await self.driver.unmap_all()
        else:
            await self.driver.unmap(pieces)

    async def do_map(self, pieces: Sequence[int] | None = None, memory: Memory | None = None) -> None:
        """Pieces of the RAM come (back), or all of it; of another kind if so said."""
        self.driver.memory = memory or self.driver.memory
        await self.driver.map(range(len(PIECES)) if pieces is None else pieces)
        self._unmapped = False

    # ---- the device ----------------------------------------------------------------------------------------------

    async def do_bring_up(self, size: int = 16, features: int = (1 << 128) - 1) -> None:
        """From any state to DRIVER_OK."""
        self.client.answers.clear()
        await self.client.answer_late()
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
        with trio.move_on_after(BUFFER_TIMEOUT):
            while self._owed():
                status = await self.driver.common("device_status")
                if status & DeviceStatus.NEEDS_RESET or self.client.closed.is_set():
                    break
                await trio.lowlevel.checkpoint()
        owed = self._owed()
        broken = owed and await self.driver.common("device_status") & DeviceStatus.NEEDS_RESET
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

    async def do_pause(self) -> None:
        """Until nothing moves any more."""
        await trio.testing.wait_all_tasks_blocked()

    async def do_sleep(self, seconds: float) -> None:
        """Time, in which slow requests end, or do not."""
        await trio.sleep(seconds)

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
