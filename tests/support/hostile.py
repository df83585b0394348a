"""Attacks on a whole server in this process, and what must be true of it after any of them.

::

    Echo or a shipped device ─ VirtioPci ─ Server ◀── socket ── Attack: messages, registers, rings, byte by byte
    a neighbour (Echo)       ─ VirtioPci ─ Server ◀── socket ── a good client with a good driver

At the end of `attacked`: nothing was stored outside of what the device was given to write, the device works for a good
driver (of the same client, or of the next one), the neighbour works, no file descriptor, mapping or task is left, no
exception came out, and the log has a few lines at most.
"""

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import trio
import trio.testing

from vfiouser_virtio.background import background
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.testing.fuzz import TARGETS, Case, FuzzTarget
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.oracle import Bounds, LogWatch, Resources
from vfiouser_virtio.testing.fuzz.perform import Performer
from vfiouser_virtio.testing.fuzz.ram import TABLES, FuzzRam
from vfiouser_virtio.testing.raw.client import RawMessage, raw_message
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.virtio import Device, Offer

HANG = 60.0
"""Seconds after which an attack has hung the server."""
LINES = 8
"""Lines of the log that one attack may cause: each kind of mistake is logged once."""
ALL_FEATURES = (1 << 128) - 1


class Rings(NamedTuple):
    """Kind of ring, and how its memory is reached."""

    packed: bool = False
    memory: Memory = "shared"

    def __str__(self) -> str:
        return ("packed" if self.packed else "split") + {"private": "-by-message"}.get(self.memory, "")


SPLIT, PACKED = Rings(), Rings(packed=True)
SPLIT_BY_MESSAGE = pytest.param(Rings(memory="private"), marks=pytest.mark.variant)
PACKED_BY_MESSAGE = pytest.param(Rings(packed=True, memory="private"), marks=pytest.mark.variant)
both_rings = pytest.mark.parametrize("rings", [SPLIT, PACKED], ids=str)
all_rings = pytest.mark.parametrize("rings", [SPLIT, PACKED, SPLIT_BY_MESSAGE, PACKED_BY_MESSAGE], ids=str)
split_rings = pytest.mark.parametrize("rings", [SPLIT, SPLIT_BY_MESSAGE], ids=str)
packed_rings = pytest.mark.parametrize("rings", [PACKED, PACKED_BY_MESSAGE], ids=str)


class Attack:
    """Hostile client of one device: its socket, its driver, its memory. Everything is allowed."""

    def __init__(
        self, served: "Served", client: FuzzClient, performer: Performer, ram: FuzzRam, log: list[str]
    ) -> None:
        self.served = served
        self.function = served.function
        self.client = client
        self.performer = performer
        self.driver = performer.driver
        self.bounds = performer.bounds
        self.ram = ram
        self.log = log
        """What was logged at WARNING or above so far."""

    # ---- messages ------------------------------------------------------------------------------------------------

    async def message(
        self, command: int, body: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0, message_id: int = 77
    ) -> RawMessage | None:
        """A request with any contents, whose size is right, and its reply; None where the server hung up."""
        return await self.client.result(
            await self.client.send(raw_message(command, body, message_id=message_id, flags=flags), fds)
        )

    async def refused(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The errno with which a request is refused; it must be."""
        reply = await self.message(command, body, fds)
        assert reply is not None, "the server hung up"
        assert reply.error, "it was not refused"
        return int(reply.error)

    async def accepted(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """The payload of the answer to a request that must not be refused."""
        reply = await self.message(command, body, fds)
        assert reply is not None, "the server hung up"
        assert not reply.error, os.strerror(reply.error)
        return reply.body

    # ---- registers -----------------------------------------------------------------------------------------------

    async def get(self, name: str) -> int:
        """A field of the common configuration."""
        return await self.driver.common(name)

    def set(self, **fields: int) -> None:
        """Write fields of the common configuration, in order."""
        for name, value in fields.items():
            self.driver.set_common(name, value)

    async def status(self) -> DeviceStatus:
        return DeviceStatus(await self.get("device_status"))

    # ---- buffers and chains --------------------------------------------------------------------------------------

    def readable(self, data: bytes) -> Segment:
        """A buffer with these bytes."""
        address = self.driver.alloc(len(data))
        self.ram.write(address, data)
        return address, len(data), 0

    def writable(self, size: int) -> Segment:
        """A buffer for the device to write to."""
        return self.driver.alloc(size), size, WRITE

    def table(self, entries: Sequence[tuple[int, int, int, int]], at: int = TABLES) -> int:
        """Descriptors anywhere, by default where indirect tables are: four numbers each. Their address."""
        self.ram.write(at, b"".join(DESC_CODEC.pack(*entry) for entry in entries))
        return at

    def indirect(self, segments: Sequence[Segment], at: int = TABLES) -> Segment:
        """A descriptor that points to an indirect table of a good chain."""
        data = self.driver.rings[0].table(segments)
        self.ram.write(at, data)
        return at, len(data), INDIRECT

    def put(self, *segments: Segment, queue: int = 0, name: int = 0, links: Sequence[int] = ()) -> None:
        """Make a chain available, its flags exactly as they are given: nothing sets NEXT here.

        ``name`` is its head or buffer id; ``links`` are the ``next`` of a split ring's descriptors, in order.
        """
        ring = self.driver.rings[queue]
        ring.hostile = True
        if isinstance(ring, RawPackedRing):
            ring.store([(address, length, name, flags) for address, length, flags in segments])
        else:
            assert isinstance(ring, RawSplitRing)
            places = [name, *(links or range(name + 1, name + len(segments) + 1))]
            for place, (address, length, flags), after in zip(places, segments, places[1:], strict=False):
                entry = DESC_CODEC.pack(address, length, flags, after & 0xFFFF)
                self.ram.write(ring.desc + DESC_CODEC.size * (place % ring.size), entry)
            ring.offer(name)
        self.bounds.note()

    async def kick(self, queue: int = 0) -> None:
        await self.driver.kick(queue)

    async def settle(self) -> None:
        """All that was sent is done, and nothing moves any more."""
        await self.client.flush()
        await self.get("num_queues")
        await trio.testing.wait_all_tasks_blocked()
        self.bounds.note()

    # ---- what came of it -----------------------------------------------------------------------------------------

    async def breaks(self, queue: int = 0) -> None:
        """The notification makes the device need a reset; it says so once, and whose fault that is."""
        await self.kick(queue)
        while not await self.status() & DeviceStatus.NEEDS_RESET:
            await trio.lowlevel.checkpoint()
        assert sum("broke virtio" in line for line in self.log) == 1, self.log

    async def length_of(self, queue: int = 0) -> int:
        """The notification has the next chain served: the used length of it."""
        await self.kick(queue)
        ring = self.driver.rings[queue]
        while (used := ring.used()) is None:
            assert not await self.status() & DeviceStatus.NEEDS_RESET, self.log
        if isinstance(ring, RawSplitRing):
            ring.seen_idx = ring.seen_idx + 1 & 0xFFFF
        return used[1]

    async def nothing(self, queue: int = 0) -> None:
        """The notification means nothing: no chain is used, no reset is needed."""
        ring = self.driver.rings[queue]
        await self.kick(queue)
        await self.settle()
        assert ring.used() is None
        assert not await self.status() & DeviceStatus.NEEDS_RESET, self.log


class Served(NamedTuple):
    """Device on a socket of this process."""

    function: VirtioPci
    listening: socket.socket
    target: FuzzTarget


@contextlib.asynccontextmanager
async def _serving(target: FuzzTarget, name: str, offer: Offer) -> AsyncIterator[Served]:
    function = VirtioPci(target.make(), name=name, offer=offer)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("")
    listening.listen(4)
    with Listener(listening, name) as listener:
        async with background() as tasks:
            tasks.start_soon(function.serve)
            tasks.start_soon(Server(function).serve, listener)
            await trio.testing.wait_all_tasks_blocked()
            yield Served(function, listening, target)


@contextlib.asynccontextmanager
async def _visiting(served: Served, memory: Memory, log: list[str]) -> AsyncIterator[Attack]:
    """A client that has connected and said nothing yet."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(FuzzRam()) as ram:
        bounds = Bounds(ram, served.function.core, takes_pages=served.target.type.takes_pages)
        client = FuzzClient(sock, ram, bounds, timeout=HANG)
        try:
            sock.connect(served.listening.getsockname())
            async with background() as tasks:
                tasks.start_soon(client.run)
                performer = Performer(client, ram, bounds, Case("rings", "", memory), served.target)
                yield Attack(served, client, performer, ram, log)
                client.close()
        finally:
            client.close()


async def _works(attack: Attack) -> None:
    """The device does what it is for, and is left as a good driver leaves it."""
    await attack.performer.do_check()
    assert not attack.client.closed.is_set(), attack.log
    await attack.driver.reset()


async def _nothing_left(before: Resources) -> None:
    """The server has let go of all that its clients brought."""
    with trio.move_on_after(HANG / 4):
        while before.grown():
            await trio.sleep(0.001)
    before.check("after all clients")


@contextlib.asynccontextmanager
async def attacked(
    device: str | FuzzTarget | Callable[[], Device] = "echo",
    rings: Rings = SPLIT,
    *,
    size: int = 16,
    features: int = ALL_FEATURES,
    offer: Offer | None = None,
    hello: bool = True,
    up: bool = True,
    lines: int = LINES,
) -> AsyncIterator[Attack]:
    """A client of a device that is served; what must be true after any attack is checked at the end.

    ``device`` is one of the fuzzer's targets, by name, or makes one that answers as `Echo` does. Without ``up`` the
    client has its memory mapped and no more, without ``hello`` it has not even sent VERSION. ``lines`` may be logged.
    """
    if isinstance(device, FuzzTarget):
        target = device
    else:
        target = TARGETS[device] if isinstance(device, str) else replace(TARGETS["echo"], make=device)
    offer = replace(offer or Offer(), packed=rings.packed)
    with trio.fail_after(HANG), LogWatch() as watch, _Lines() as log:
        async with (
            _serving(TARGETS["echo"], "neighbour", Offer()) as beside,
            _visiting(beside, "shared", log) as neighbour,
            _serving(target, "attacked", offer) as served,
        ):
            await neighbour.performer.do_hello()
            served.function.io_fds(VIRTIO_BAR)
            await trio.testing.wait_all_tasks_blocked()
            before = Resources.now()
            async with _visiting(served, rings.memory, log) as attack:
                if hello:
                    await attack.performer.do_hello()
                if up:
                    await attack.performer.do_bring_up(size, features)
                yield attack
                await attack.settle()
                attack.bounds.check()
                assert len(log) <= lines, log
                again = attack.client.in_step and not attack.client.closed.is_set() and hello
                if again:
                    await _works(attack)
            if not again:
                async with _visiting(served, rings.memory, log) as good:
                    await good.performer.do_hello()
                    await _works(good)
            await _works(neighbour)
            await _nothing_left(before)
    assert not watch.findings, watch.findings[0]


class _Lines(logging.Handler):
    """What the package logs at WARNING or above, as texts."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("vfiouser_virtio").addHandler(self)
        return self.texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vfiouser_virtio").removeHandler(self)
