"""Network device as a check drives it: raw rings of every queue, commands, packets out and in.

The rings are packed where the device offers that: the same rules are then looked at on the other kind of ring.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import trio

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.protocols.record import Record
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature, FeatureBit, mask_of
from vfiouser_virtio.protocols.virtio.net import Ack, CtrlClass, NetFeature
from vfiouser_virtio.testing.conformance.bench import RING_SIZE, Bench
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, fail, note
from vfiouser_virtio.testing.raw.ring import WRITE, RawRing

_POLL = 0.0005  # seconds between two looks at memory
_CANARY = 0xA5

Command = IntEnum | tuple[int, int]
"""A command by its name, or as class and command."""

_CLASSES: dict[type, CtrlClass] = {
    net.CtrlRx: CtrlClass.RX,
    net.CtrlMac: CtrlClass.MAC,
    net.CtrlVlan: CtrlClass.VLAN,
    net.CtrlAnnounce: CtrlClass.ANNOUNCE,
    net.CtrlMq: CtrlClass.MQ,
    net.CtrlGuestOffloads: CtrlClass.GUEST_OFFLOADS,
    net.CtrlNotfCoal: CtrlClass.NOTF_COAL,
    net.CtrlStats: CtrlClass.STATS,
}


class Header(NamedTuple):
    """Header of a packet (5.1.9); the fields of hashes and of tunnels are only there where that was negotiated."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0
    hash_value: int = 0
    hash_report: int = 0
    outer_th_offset: int = 0
    inner_nh_offset: int = 0


COMPLETE = Header()
"""Header of a packet for which nothing is left to be done."""


class ReceivedFrame(NamedTuple):
    """Packet that has arrived."""

    pair: int
    """Of the queue that it came by, from 0."""
    header: Header
    data: bytes
    """The frame."""
    lengths: Sequence[int]
    """``len`` of its used buffers."""
    together: bool
    """All of them were used when the first one was."""


class ControlAnswer(NamedTuple):
    """Answer to a command."""

    ack: int
    result: bytes
    """All that there was room for, written or not."""
    used: int
    """``len`` of the used element."""


class ConformanceDriver:
    """Driver of one network device, from a reset on."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.features = 0
        self.pairs = 0
        """Pairs of queues in use."""
        self.rings: dict[int, RawRing] = {}
        self._hdr = net.HDR_CODEC
        self._buffers: dict[tuple[int, int], DmaBuffer] = {}
        # Used receive buffers with their lengths, by queue. Not by their ids: a ring gives those again.
        self._waiting: dict[int, list[tuple[DmaBuffer, int]]] = {}
        self._late: set[int] = set()

    def offers(self, *features: FeatureBit) -> bool:
        """Whether the device offers all of these."""
        mask = mask_of(features)
        return self.bench.offered & mask == mask

    def has(self, feature: FeatureBit) -> bool:
        """Whether it was negotiated."""
        return bool(self.features & feature.mask)

    async def config(self) -> Record:
        """The configuration; fields that the device does not have are zero."""
        config = net.Config()
        data = await self.bench.config(len(config.data))
        config.data[: len(data)] = data
        return config

    async def mac(self) -> bytes:
        """The device's address."""
        mac = (await self.config())["mac"]
        assert isinstance(mac, bytes)
        return mac

    async def number(self, field: str) -> int:
        """A field of the configuration that is a number."""
        value = (await self.config())[field]
        assert isinstance(value, int)
        return value

    async def max_pairs(self) -> int:
        """Pairs of queues that there are with MQ or RSS."""
        several = self.offers(NetFeature.MQ) or self.offers(NetFeature.RSS)
        return await self.number("max_virtqueue_pairs") if several else 1

    # ---- from reset to DRIVER_OK ---------------------------------------------------------------------------------

    async def start(self, *features: FeatureBit, pairs: int = 1, room: int = 2048, buffers: int = 8) -> None:
        """All steps with the least of features and these; so many receive buffers of ``room`` bytes for each pair.

        Raises Failed where the device does not take the features, NotApplicable where it has too few queues.
        """
        bench = self.bench
        if pairs > 1 and await self.max_pairs() < pairs:
            raise NotApplicable(f"needs {pairs} pairs of queues")
        await bench.reset()
        self.features = bench.minimum | mask_of(features) | bench.offered & Feature.RING_PACKED.mask
        if not await bench.try_features(self.features):
            fail(f"FEATURES_OK does not stay for the features {self.features:#x} of the {bench.offered:#x} offered")
        self._hdr = net.hdr_codec(self.features)
        self.pairs, self.rings = pairs, {}
        waiting = (buffer for each in self._waiting.values() for buffer, _ in each)
        for buffer in (*self._buffers.values(), *waiting):
            bench.memory.free(buffer)
        self._buffers.clear()
        self._waiting.clear()
        self._late.clear()
        for index in range(2 * pairs):
            await self.enable(index)
        if self.has(NetFeature.CTRL_VQ):
            await self.enable(await self.control_index())
        await bench.driver_ok()
        for pair in range(pairs):
            for _ in range(min(buffers, self.rings[2 * pair].size)):
                self._offer(2 * pair, bench.memory.alloc(room))
            await bench.kick(2 * pair)

    async def control_index(self) -> int:
        """Index of the control queue, with what was negotiated (5.1.2)."""
        sets = net.TYPE.sets
        assert sets is not None
        return 2 * sets.number(self.features, await self.number("max_virtqueue_pairs"))

    async def enable(self, index: int) -> None:
        """Set up a queue, with an empty ring in new memory."""
        bench = self.bench
        await bench.select(index)
        largest = await bench.get("queue_size")
        expect(largest > 0, f"queue {index:#x} has queue_size 0, so it does not exist")
        make = bench.packed_ring if self.has(Feature.RING_PACKED) else bench.split_ring
        ring = make(min(RING_SIZE, largest))
        ring.index = index
        await bench.place(ring, index)
        self.rings[index] = ring
        self._waiting[index] = []

    # ---- control queue -------------------------------------------------------------------------------------------

    async def command(
        self, command: Command, data: bytes = b"", *, room: int = 0, pieces: int = 0, limit: int | None = None
    ) -> ControlAnswer:
        """A command, cut as Linux cuts it, or into that many ``pieces``; it may end after ``limit`` bytes, too early.

        ``room`` is for its result. Raises Failed where the buffer is not used.
        """
        kind, number = command if isinstance(command, tuple) else (_CLASSES[type(command)], command)
        request = (bytes([kind, number]) + data)[:limit]
        cuts = range(1, min(pieces, len(request))) if pieces else [2] if len(request) > 2 else []
        index = await self.control_index()
        ring, memory = self.rings[index], self.bench.memory
        out, into = memory.alloc(len(request)), memory.alloc(1 + room)
        out.view[:] = request
        into.view[:] = bytes([_CANARY]) * (1 + room)
        ends = [*cuts, len(request)]
        segments = [
            *((out.address + start, end - start, 0) for start, end in zip([0, *cuts], ends, strict=True)),
            (into.address, 1, WRITE),
            *([(into.address + 1, room, WRITE)] if room else []),
        ]
        ring.add(segments)
        await self.bench.kick(index)
        used = await self._used(ring, f"{_name(command)} is not answered")
        answer = ControlAnswer(into.view[0], bytes(into.view[1:]), used)
        memory.free(out)
        memory.free(into)
        return answer

    async def ok(self, command: Command, data: bytes = b"", *, room: int = 0) -> ControlAnswer:
        """A command that must succeed. Raises Failed."""
        answer = await self.command(command, data, room=room)
        expect(answer.ack == Ack.OK, f"{_name(command)} with data {_shown(data)}: ack is {answer.ack:#x}, not OK")
        return answer

    async def refused(self, command: Command, data: bytes, why: str, *, room: int = 0) -> None:
        """A command that is to be answered ERR; notes where it is not."""
        ack = (await self.command(command, data, room=room)).ack
        note(ack == Ack.ERR, f"{_name(command)} {why}: ack is {ack:#x}, not ERR")

    # ---- packets -------------------------------------------------------------------------------------------------

    async def send(self, data: bytes, header: Header = COMPLETE, *, pair: int = 0) -> None:
        """Transmit a packet; returns when its buffer is used. Raises Failed where it is not."""
        count = len(self._hdr.unpack(bytes(self._hdr.size)))
        fields = (*header[:7], 0, 0, 0, header.outer_th_offset, header.inner_nh_offset)  # the hash is not the driver's
        await self.transmit(self._hdr.pack(*fields[:count]) + data, pair=pair)

    async def transmit(self, message: bytes, *, pair: int = 0) -> None:
        """Bytes that need be no packet: one transmit buffer. Raises Failed where it is not used."""
        ring, memory = self.rings[2 * pair + 1], self.bench.memory
        buffer = memory.alloc(len(message))
        buffer.view[:] = message
        ring.add([(buffer.address, len(message), 0)])
        await self.bench.kick(ring.index)
        await self._used(ring, f"a buffer of transmitq{pair + 1} is not used")
        memory.free(buffer)

    async def goes_on(self, what: str) -> None:
        """The device needs no reset, and takes one more packet. Raises Failed."""
        status = await self.bench.get("device_status")
        expect(not status & DeviceStatus.NEEDS_RESET, f"{what}: device_status is {status:#x}, it needs a reset")
        await self.send(frames.frame(frames.BROADCAST))

    async def received(self) -> list[ReceivedFrame]:
        """What has arrived since the last look; its buffers are offered again."""
        found: list[ReceivedFrame] = []
        for pair in range(self.pairs):
            index = 2 * pair
            waiting = self._waiting[index]
            before = len(waiting)
            while (element := self._take(self.rings[index])) is not None:
                waiting.append((self._buffers.pop((index, element[0])), element[1]))
            if len(waiting) == before:
                continue
            while (one := self._packet(pair)) is not None:
                found.append(one)
            await self.bench.kick(index)
        return found

    async def receive(self, wanted: Callable[[ReceivedFrame], bool]) -> list[ReceivedFrame] | None:
        """What arrives, up to a packet that is wanted and what is there then; None where that does not come."""
        found: list[ReceivedFrame] = []
        with trio.move_on_after(self.bench.wire.timeout):
            while True:
                found += await self.received()
                if any(map(wanted, found)):
                    return found + await self.received()
                await trio.sleep(_POLL)
        return None

    def _packet(self, pair: int) -> ReceivedFrame | None:
        """The next packet of a queue, where all of its buffers are used."""
        index = 2 * pair
        waiting, size = self._waiting[index], self._hdr.size
        if not waiting:
            return None
        first = waiting[0][0].view
        values = self._hdr.unpack(first[:size]) if len(first) >= size else ()
        header = Header(*values[:9], *values[10:])
        # A number that cannot be is no reason to wait: the check looks at it.
        count = header.num_buffers if 0 < header.num_buffers <= self.rings[index].size else 1
        if len(waiting) < count:
            self._late.add(index)
            return None
        together = index not in self._late
        self._late.discard(index)
        taken = waiting[:count]
        del waiting[:count]
        data = b"".join(bytes(buffer.view[:length]) for buffer, length in taken)
        for buffer, _ in taken:
            self._offer(index, buffer)
        return ReceivedFrame(pair, header, data[size:], [length for _, length in taken], together)

    def _offer(self, index: int, buffer: DmaBuffer) -> None:
        """Make a receive buffer available."""
        self._buffers[index, self.rings[index].add([(buffer.address, len(buffer.view), WRITE)])] = buffer

    # ---- used buffers --------------------------------------------------------------------------------------------

    async def _used(self, ring: RawRing, otherwise: str) -> int:
        """The used length of the one buffer of a queue, when that is used. Raises Failed."""
        found: list[tuple[int, int]] = []

        async def there() -> bool:
            if (element := self._take(ring)) is not None:
                found.append(element)
            return bool(found)

        await self.bench.until(there, otherwise)
        return found[0][1]

    @staticmethod
    def _take(ring: RawRing) -> tuple[int, int] | None:
        try:
            return ring.take_used()
        except LookupError as error:
            fail(f"queue {ring.index:#x}: {error}")


def _name(command: Command) -> str:
    if isinstance(command, tuple):
        return f"command {command[1]:#x} of class {command[0]:#x}"
    return f"{_CLASSES[type(command)].name}_{command.name}"


def _shown(data: bytes) -> str:
    return f"of {len(data):#x} bytes" if len(data) > 16 else data.hex(" ") or "of no bytes"
