"""Delivery of frames into a driver's receive buffers (virtio 1.4, 5.1.9.3.1, 5.1.9.4), alone or in bursts.

::

    frame ──▶ steering ──▶ one buffer with room: header, frame ──────────────────────────▶ used ring
                       ├─▶ as many as it takes, with MRG_RXBUF ── shown together ─────────▶
                       └─▶ too few: `wait_room`      too small, or no queue: dropped, and counted
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

import trio

from vfiouser_virtio.backends.net.drops import Drop, Drops
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.backends.net.offload import needs
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_receive_queue import ReceiveQueue, does_of
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
_TUNNEL_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.UDP_TUNNEL_CSUM)
_TUNNEL = int(net.GSO_UDP_TUNNEL)
_NO_VIEW = memoryview(bytearray())
_NO_BUFFERS: list[tuple[int, int, int]] = []


class Delivery:
    """Base class of `Receiver`: from a frame that the driver is to see to its buffers, which need no more of it.

    What is wrong with the driver's buffers is found in a call of the netdev, which has nothing to do with it: it is
    kept for `Receiver.run`. A base class, not a part: each call is a tenth of what a short frame takes.
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
        self._lacking: tuple[Queue, int] | None = None
        self._gave_up = False
        self._error: GuestError | None = None
        self._broken = trio.Event()
        self.begin(0, None)

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

    # ---- frames ----------------------------------------------------------------------------------------------------

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
        header = memoryview(self._header(frame.offload, hashed, end - begin))
        written += fill(view, buffers[begin:end], (header, *frame.segments), total)
        self._gave_up = False
        return True

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


def fill(
    view: memoryview, buffers: Sequence[tuple[int, int, int]], source: Iterable[memoryview], total: int
) -> list[int]:
    """Copy ``total`` bytes to `Singles.buffers` of this view, all of which they take; what each has got."""
    following = iter(buffers)
    start = room = 0
    for piece in source:
        while len(piece) > room:
            view[start : start + room] = piece[:room]
            piece = piece[room:]
            _, start, room = next(following)
        end = start + len(piece)
        view[start:end] = piece
        room -= end - start
        start = end
    written = [room for _, _, room in buffers]
    written[-1] += total - sum(written)
    return written


def _take(source: list[memoryview], count: int) -> Iterator[memoryview]:
    """The next ``count`` bytes, taken off the end of a list of segments in reverse order, which has as many."""
    while count:
        segment = source.pop()
        if len(segment) > count:
            source.append(segment[count:])
            segment = segment[:count]
        count -= len(segment)
        yield segment
