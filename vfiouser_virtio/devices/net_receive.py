"""Receive path of a network device (virtio 1.4, 5.1.9.3, 5.1.9.4): from the network into the driver's buffers.

::

    netdev ──▶ Receiver.put ──▶ filter ──▶ steering ──▶ offloads that the driver has not ──▶ buffers ──▶ used ring

A frame is copied once, from where its netdev has it (another guest's memory, as a rule) to the driver's buffers.

A long file, since all of it is about one frame on its way, and shares what is left of the frame before.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import trio

from vfiouser_virtio.backends.net.drops import Drop, Drops
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import Does, Netdev
from vfiouser_virtio.backends.net.offload import BadOffload, finish, needs
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_steering import Steering
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import HdrFlags, NetFeature
from vfiouser_virtio.virtio import Chain, GuestError, Queue, Singles

STUCK = 1.0
"""Seconds for which a frame waits for more buffers where there are some, but with too little room for it.

Then it is dropped: a driver that has no more of them, and waits for that packet, would stop the network for good.
"""
MAX_SPREAD = 1024
"""Buffers that one frame is spread over: QEMU's limit, with which they have 64 bytes each for the longest frame.

A driver of 5000 buffers with room for a header alone had each of its notifications take all of them, and give them
back, for 50 ms in which no other device was served.
"""
_NO_LIMIT = 1 << 32
# What a filter looks at: addresses, type, VLAN.
_HEAD = struct.Struct("16s")
# Buffers that are taken at once for a long frame.
_SPREAD = 16
_VLAN_TAG, _VLAN_HLEN = b"\x81\x00", 4
FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID)
_NEEDS_CSUM, _DATA_VALID = int(HdrFlags.NEEDS_CSUM), int(HdrFlags.DATA_VALID)
_TUNNEL_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.UDP_TUNNEL_CSUM)
_TUNNEL = int(net.GSO_UDP_TUNNEL)
_NO_VIEW = memoryview(bytearray())
_NO_BUFFERS: list[tuple[int, int, int]] = []


def does_of(features: int) -> Does:
    """What a driver with these features takes upon itself. Segmentation requires GUEST_CSUM (5.1.3.1)."""
    does = Does(0)
    if features & NetFeature.GUEST_CSUM.mask:
        does |= Does.CSUM
        for bits, what in (
            ((NetFeature.GUEST_TSO4,), Does.TSO4),
            ((NetFeature.GUEST_TSO6,), Does.TSO6),
            ((NetFeature.GUEST_ECN,), Does.ECN),
            # A frame does not say of which of the two it is.
            ((NetFeature.GUEST_USO4, NetFeature.GUEST_USO6), Does.USO),
            ((NetFeature.GUEST_UDP_TUNNEL_GSO,), Does.TUNNEL),
            ((NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM,), Does.TUNNEL_CSUM),
        ):
            if all(features & bit.mask for bit in bits):
                does |= what
    return does


@dataclass(slots=True)
class ReceiveQueue:
    """Receive queue with its statistics (5.1.9.5.11.4), which grow until the device is reset."""

    queue: Queue
    packets: int = 0
    bytes: int = 0
    drops: int = 0
    """Frames that did not get here, for whatever reason but the filter."""
    drop_overruns: int = 0
    """Those for which the driver's buffers have no room."""
    csum_valid: int = 0
    needs_csum: int = 0
    csum_none: int = 0
    gso_packets: int = 0
    gso_bytes: int = 0

    def count(self, offload: Offload | None, length: int, packets: int = 1) -> None:
        """A frame has been delivered, or several of one kind with ``length`` bytes together."""
        self.packets += packets
        self.bytes += length
        if offload is None:
            self.csum_none += packets
            return
        if offload.flags & _NEEDS_CSUM:
            self.needs_csum += packets
        elif offload.flags & _DATA_VALID:
            self.csum_valid += packets
        else:
            self.csum_none += packets
        if offload.gso_type:
            self.gso_packets += packets
            self.gso_bytes += length

    def forget(self) -> None:
        """The device was reset."""
        for each in fields(self)[1:]:
            setattr(self, each.name, 0)


class Receiver:
    """`FrameSink` for the frames of the network: puts them into the driver's buffers.

    Frames are dropped while the driver is not ready or the link is down, as on any network. What is wrong with the
    driver's buffers is found in a call of the netdev, which has nothing to do with it, and is a task of another guest's
    device where the netdev is a hub: `run` raises it.
    """

    def __init__(self, queues: Sequence[Queue], wanted: ReceiveFilter, steering: Steering, log: DeviceLog) -> None:
        self.queues = [ReceiveQueue(queue) for queue in queues]
        self.filter = wanted
        self.steering = steering
        self.log = log
        self.filtered = 0
        """Frames that the driver does not want to see."""
        self.drops = Drops()
        """Those that it does not get to see for another reason; resets of the device do not change them."""
        self.does = Does(0)
        self._running, self._link = False, True
        self._open = False
        self._lacking: tuple[Queue, int] | None = None
        self._gave_up = False
        self._rest: tuple[Frame, Iterator[Frame]] | None = None
        self._error: GuestError | None = None
        self._wake_pump, self._broken = trio.Event(), trio.Event()
        self.begin(0, None)

    # ---- the driver ----------------------------------------------------------------------------------------------

    def begin(self, features: int, mtu: int | None) -> None:
        """A driver has accepted these features; ``mtu`` if it is to be kept to."""
        codec = net.hdr_codec(features)
        self._mergeable = bool(features & NetFeature.MRG_RXBUF.mask)
        self._size, self._pack = codec.size, codec.pack
        self._no_hash = (0,) * (len(codec.unpack(bytes(codec.size))) - 7)
        self._reports = bool(features & NetFeature.HASH_REPORT.mask)  # a header for tunnels has the fields in any case
        self._plain = self._pack(0, 0, 0, 0, 0, 0, 1, *self._no_hash)
        self._limit = _NO_LIMIT if mtu is None else mtu + net.ETH_HLEN
        self.set_offloads(does_of(features))

    def set_offloads(self, does: Does) -> None:
        """What the driver takes from now on; the rest is done before it sees a frame."""
        self.does = does if does & Does.CSUM else Does(0)
        self._does = int(self.does)

    def set_link(self, up: bool) -> None:
        """Frames are dropped while there is no link."""
        self._link = up
        self._open = self._running and up

    def _set_running(self, running: bool) -> None:
        self._running = running
        self._open = running and self._link

    def reset(self) -> None:
        """The driver has reset the device."""
        for each in self.queues:
            each.forget()
        self.filtered = 0
        self.begin(0, None)

    async def run(self, netdev: Netdev) -> None:
        """Let the netdev hand over its frames. Raises GuestError when the driver has broken a receive queue."""
        self._lacking = self._rest = self._error = None
        self._gave_up = False
        self._set_running(True)
        self._wake_pump, self._broken = trio.Event(), trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(netdev.run, self)
                nursery.start_soon(self._pump)
                await self._broken.wait()
                assert self._error is not None
                raise self._error
        finally:
            self._set_running(False)

    async def _pump(self) -> None:
        """Deliver what is left of a frame that was cut, where the netdev has no other that would push it."""
        while True:
            await self._wake_pump.wait()
            self._wake_pump = trio.Event()
            while self._rest is not None and not self._put_rest():
                await self.wait_room()

    # ---- the network ---------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        """See `FrameSink`. A long function, since each call that it saves is a tenth of what a short frame takes."""
        if not self._open:
            self.queues[0].drops += 1
            self.drops.add(Drop.LINK_DOWN if self._running else Drop.NO_DRIVER)
            return True
        if not self.filter.everything and not self.filter.accepts(frame):
            self.filtered += 1
            return True
        if self._rest is not None and not self._put_rest():
            return False
        offload = frame.offload
        if offload is not None and needs(offload) & ~self._does:
            return self._put_finished(frame)
        return self._deliver(frame)

    def put_burst(self, frames: Sequence[Frame]) -> int:
        """See `burst_putter`: frames and buffers of the usual kind are shown to the driver together."""
        taken, count = 0, len(frames)
        while taken < count:
            if self._open and self._rest is None:
                taken += self._put_singles(frames[taken:] if taken else frames)
            if taken == count or not self.put(frames[taken]):  # which needs something else, or there is no room
                break
            taken += 1
        return taken

    def _put_singles(self, frames: Sequence[Frame]) -> int:
        """Deliver frames into buffers of one piece each, until one of them needs anything else; how many.

        One loop for all that happens to a frame, since each call in it is a twentieth of what a short frame takes.
        """
        steering, wanted, does, size, limit = self.steering, self.filter, self._does, self._size, self._limit
        everything, trivial = wanted.everything, steering.trivial
        receiveq, singles, hashed, passed = self.queues[0], None, None, None
        header, done, complete, octets = self._plain, 0, 0, 0
        written: list[int] = []
        view, buffers = _NO_VIEW, _NO_BUFFERS
        try:
            for frame in frames:
                if not everything:
                    (first,) = _HEAD.unpack_from(frame.segments[0])
                    if first != passed:
                        if not wanted.accepts(frame):
                            self.filtered += 1
                            done += 1
                            continue
                        passed = first
                offload, length = frame.offload, frame.length
                if offload is not None:
                    if needs(offload) & ~does:
                        break
                    if length > limit and not offload.gso_type:
                        break
                elif length > limit:
                    break
                if not trivial:
                    pair, value, report = steering.steer(frame)
                    if singles is not None and receiveq is not self.queues[pair]:
                        break
                    receiveq = self.queues[pair]
                    hashed = (value, report, *self._no_hash[2:]) if self._reports else None
                if singles is None:
                    singles = receiveq.queue.take_singles(len(frames) - done, writable=True)
                    if singles is None:
                        break
                    view, buffers = singles.view, singles.buffers
                elif len(written) == len(buffers) and not singles.more(len(frames) - done):
                    break
                _, start, room = buffers[len(written)]
                total = length + size
                if total > room:
                    if not self._spread_singles(singles, frame, hashed, written):
                        break
                else:
                    if offload is not None or hashed is not None:
                        header = self._header(offload, hashed)
                    end = start + size
                    view[start:end] = header
                    for segment in frame.segments:
                        start = end
                        end += len(segment)
                        view[start:end] = segment
                    written.append(total)
                if offload is None:
                    complete += 1
                    octets += length
                else:
                    header = self._plain
                    receiveq.count(offload, length)
                done += 1
        except (struct.error, IndexError):
            pass  # too short for its addresses to be looked at like this
        except GuestError as error:
            self._fail(error)
            done += 1
        finally:
            if singles is not None:
                singles.end(written)
        receiveq.packets += complete
        receiveq.bytes += octets
        receiveq.csum_none += complete
        return done

    def _spread_singles(
        self, singles: Singles, frame: Frame, hashed: tuple[int, ...] | None, written: list[int]
    ) -> bool:
        """Over as many buffers as it takes (5.1.9.4.1), behind those that were written; False where that cannot be."""
        view, buffers, total = singles.view, singles.buffers, frame.length + self._size
        begin = end = len(written)
        if not self._mergeable or buffers[begin][2] < self._size:
            return False
        room = 0
        while room < total:
            if end - begin == MAX_SPREAD or (end == len(buffers) and not singles.more(_SPREAD)):
                return False
            room += buffers[end][2]
            end += 1
        source = [memoryview(self._header(frame.offload, hashed, end - begin)), *frame.segments]
        source.reverse()
        for _, start, length in buffers[begin:end]:
            count = min(length, total)
            total -= count
            written.append(count)
            for piece in _take(source, count):
                stop = start + len(piece)
                view[start:stop] = piece
                start = stop
        self._gave_up = False
        return True

    async def wait_room(self) -> None:
        """See `FrameSink`. What the driver breaks meanwhile is raised by `run`, not here, where others wait for it."""
        lacking = self._lacking
        if lacking is None:
            await trio.lowlevel.checkpoint()
            return
        queue, count = lacking
        try:
            if count == 1:
                await queue.wait()
                return
            with trio.move_on_after(STUCK) as waiting:
                await queue.wait(count)
            self._gave_up = waiting.cancelled_caught
        except GuestError as error:
            self._break(error)
            await trio.lowlevel.checkpoint()

    def _put_finished(self, frame: Frame) -> bool:
        """Deliver a frame of which the driver has to be spared some work."""
        assert frame.offload is not None
        try:
            pieces = iter(finish(frame, self._does))
        except BadOffload as error:
            self.queues[0].drops += 1
            self.drops.add(Drop.BAD_OFFLOAD)
            self.log.once("bad offload of the network", "a frame of the network is dropped: %s", error)
            return True
        first = next(pieces)
        if not self._deliver(first):
            return False
        for piece in pieces:
            if not self._deliver(piece):
                self._rest = piece, pieces
                self._wake_pump.set()
                break
        return True

    def _put_rest(self) -> bool:
        assert self._rest is not None
        piece, pieces = self._rest
        while self._deliver(piece):
            following = next(pieces, None)
            if following is None:
                self._rest = None
                return True
            piece = following
        self._rest = piece, pieces
        return False

    def _deliver(self, frame: Frame) -> bool:
        """Into the driver's buffers; False where there are too few."""
        steering, offload, length = self.steering, frame.offload, frame.length
        if steering.trivial:
            receiveq, hashed = self.queues[0], None
        else:
            pair, value, report = steering.steer(frame)
            receiveq = self.queues[pair]
            hashed = (value, report, *self._no_hash[2:]) if self._reports else None
        if length > self._limit and (offload is None or not offload.gso_type) and not self._is_tagged(frame):
            receiveq.drops += 1
            self.drops.add(Drop.TOO_LONG)
            return True
        queue, total = receiveq.queue, length + self._size
        try:
            chain = queue.next_nowait()
            if chain is None:
                if not queue.enabled:
                    return self._deliver_elsewhere(receiveq, frame)
                if queue.abandoned:
                    receiveq.drops += 1
                    self.drops.add(Drop.NO_CLIENT)
                    return True
                self._lacking = queue, 1
                return False
            if chain.room < total:
                return self._spread(receiveq, chain, frame, hashed)
            plain = offload is None and hashed is None
            chain.fill(self._plain if plain else self._header(offload, hashed), frame.segments, total)
        except GuestError as error:
            self._fail(error)
            return True
        if offload is not None:
            receiveq.count(offload, length)
        else:
            receiveq.packets += 1
            receiveq.bytes += length
            receiveq.csum_none += 1
        return True

    def _deliver_elsewhere(self, receiveq: ReceiveQueue, frame: Frame) -> bool:
        """The driver has reset the queue, or never enabled it: another one (5.1.9.5.6.2), or none (5.1.9.5.7.3)."""
        for pair, each in enumerate(self.queues):
            if each.queue.enabled and self.steering.move(frame, pair):
                return self._deliver(frame)
        receiveq.drops += 1
        self.drops.add(Drop.NO_QUEUE)
        return True

    def _spread(self, receiveq: ReceiveQueue, first: Chain, frame: Frame, hashed: tuple[int, ...] | None) -> bool:
        """Over as many buffers as it takes (5.1.9.4.1): all but the last full, and shown to the driver together."""
        queue, total = receiveq.queue, frame.length + self._size
        chains, room = [first], first.room
        most = min(queue.size, MAX_SPREAD)
        while room < total and self._mergeable and len(chains) < most:
            if chains[-1].room < self._size:
                raise GuestError(
                    f"a receive buffer of {chains[-1].room:#x} bytes has no room for a header of {self._size:#x}"
                )
            chain = queue.next_nowait()
            if chain is None:
                break
            chains.append(chain)
            room += chain.room
        if room < total:
            for chain in reversed(chains):
                queue.put_back(chain)
            if self._mergeable and len(chains) < most and not self._gave_up:
                self._lacking = queue, len(chains) + 1
                return False
            self._gave_up = False
            receiveq.drops += 1
            receiveq.drop_overruns += 1
            self.drops.add(Drop.SMALL_BUFFERS)
            self.log.once(
                "receive buffers too small",
                "a frame of %#x bytes is dropped: with its header it takes %#x, and %d receive buffers of the driver "
                "have %#x together",
                frame.length,
                total,
                len(chains),
                room,
            )
            return True
        self._gave_up = False
        offload = frame.offload
        source = [memoryview(self._header(offload, hashed, len(chains))), *frame.segments]
        source.reverse()
        filled = []
        for chain in chains:
            count = min(chain.room, total)
            total -= count
            chain.writable.write_all(_take(source, count))
            filled.append((chain, count))
        queue.complete_together(filled)
        receiveq.count(offload, frame.length)
        return True

    def _header(self, offload: Offload | None, hashed: tuple[int, ...] | None, buffers: int = 1) -> bytes:
        rest = self._no_hash if hashed is None else hashed
        if offload is None:
            return self._pack(0, 0, 0, 0, 0, 0, buffers, *rest)
        if offload[1] & _TUNNEL:  # the last two fields are there: the driver takes such packets
            return self._pack(offload[0] & _TUNNEL_FLAGS, *offload[1:6], buffers, *rest[:3], *offload[6:])
        return self._pack(offload[0] & FLAGS, *offload[1:6], buffers, *rest)

    def _is_tagged(self, frame: Frame) -> bool:
        """Whether the frame is longer than the MTU allows by a VLAN tag only, which is part of the Ethernet header."""
        return frame.length <= self._limit + _VLAN_HLEN and frame.head(net.ETH_HLEN)[12:] == _VLAN_TAG

    def _fail(self, error: GuestError) -> None:
        self.queues[0].drops += 1
        self.drops.add(Drop.BROKEN)
        self._break(error)

    def _break(self, error: GuestError) -> None:
        """Have `run` raise this."""
        self._error = error
        self._broken.set()


def _take(source: list[memoryview], count: int) -> Iterator[memoryview]:
    """The next ``count`` bytes, taken off the end of a list of segments in reverse order, which has as many."""
    while count:
        segment = source.pop()
        if len(segment) > count:
            source.append(segment[count:])
            segment = segment[:count]
        count -= len(segment)
        yield segment
