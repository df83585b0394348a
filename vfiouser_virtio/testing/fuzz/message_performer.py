"""Steps of a fuzz case that are the same for every device: messages, and memory that goes and comes."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import trio
import trio.testing

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags
from vfiouser_virtio.testing.fuzz import fd_kinds, message_step
from vfiouser_virtio.testing.fuzz.case import Case, Memory, Step
from vfiouser_virtio.testing.fuzz.client import FuzzClient, hello
from vfiouser_virtio.testing.fuzz.function_driver import FunctionDriver
from vfiouser_virtio.testing.fuzz.ram import PIECES, FuzzRam
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds
from vfiouser_virtio.testing.raw.client import raw_message

AnyDriver = TypeVar("AnyDriver", bound=FunctionDriver)
AnyBounds = TypeVar("AnyBounds", bound=StoreBounds)
_REMAPPING = {Command.DMA_MAP, Command.DMA_UNMAP}


class MessagePerformer(Generic[AnyDriver, AnyBounds]):
    """Part of one client in a case: each method is one kind of step, its parameters are the keys of the step."""

    def __init__(self, client: FuzzClient, ram: FuzzRam, case: Case, driver: AnyDriver, bounds: AnyBounds) -> None:
        self.client = client
        self.ram = ram
        self.driver = driver
        self.bounds = bounds
        self._twin = case.twin
        self._unmapped = False
        """Memory has gone, until `do_map`: a buffer in flight comes back then, or the device needs a reset."""
        self._other_memory = False
        """A message of the case may have mapped something else where the driver has its rings."""

    async def perform(self, step: Step) -> None:
        """One step, of which `stage.check_steps` has nothing to say. Raises Found."""
        if self.client.closed.is_set():
            return
        parameters = dict(step)
        name = parameters.pop("do")
        await getattr(self, "do_" + name)(**parameters)
        self.performed(name)

    def performed(self, name: str) -> None:
        """A step has been done."""

    def disturbed(self, command: int, region: int | None = None, offset: int = 0) -> None:
        """A message was sent, or is about to be, after which the device need not do what it was asked before."""

    async def do_check(self) -> None:
        """The device works: from whatever state it is in."""
        raise NotImplementedError

    async def leave_quiet(self) -> None:
        """Reset the device before the client goes."""
        raise NotImplementedError

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
        self.disturbed(command)
        self._other_memory |= command in _REMAPPING
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
        """REGION_READ, or what it leads to."""
        if self.driver.is_direct:
            with suppress(PeerError):
                await self.driver.read(region, offset, count)
        else:
            await self.client.call(Command.REGION_READ, struct.pack("<QII", offset, region, count))

    async def do_write(self, region: int, offset: int, data: str, posted: bool = False) -> None:
        """REGION_WRITE, as a request or posted; or what it leads to, behind which the device has its turn, or not."""
        self.disturbed(Command.REGION_WRITE, region, offset)
        payload = bytes.fromhex(data)
        if self.driver.is_direct:
            with suppress(PeerError):
                self.driver.write(region, offset, payload)
            if not posted:
                await trio.lowlevel.checkpoint()
            return
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

    async def have_memory(self) -> None:
        """Map all memory anew, where something else may be there."""
        if self._other_memory:
            self._other_memory = False
            await self.driver.unmap_all()
            await self.driver.map()

    async def do_map(self, pieces: Sequence[int] | None = None, memory: Memory | None = None) -> None:
        """Pieces of the RAM come (back), or all of it; of another kind if so said."""
        self.driver.memory = memory or self.driver.memory
        await self.driver.map(range(len(PIECES)) if pieces is None else pieces)
        self._unmapped = False

    async def do_pause(self) -> None:
        """Until nothing moves any more."""
        await trio.testing.wait_all_tasks_blocked()

    async def do_sleep(self, seconds: float) -> None:
        """Time, in which slow requests end, or do not."""
        await trio.sleep(seconds)
