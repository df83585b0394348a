"""Transmit path of a network device (virtio 1.4, 5.1.9.2): from the driver's buffers to the netdev.

::

    transmitq ──▶ header: what it says, checked ──▶ netdev.put: taken ──▶ used ring
                          │ lies: dropped, counted          └─ no room: the rest of the burst waits
                          └─ work that the netdev does not do: done here

Packets that cannot be are dropped, as a network card does it: nothing in the chapter has a device refuse a driver for
one, and a guest's program may have made it (AF_PACKET with PACKET_VNET_HDR).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain as chain_of
from itertools import islice
from operator import itemgetter
from time import perf_counter

from vfiouser_virtio.backends.net.drops import Drop, Drops
from vfiouser_virtio.backends.net.frame import LENGTH, Frame, Offload
from vfiouser_virtio.backends.net.netdev import (
    MAX_FRAME,
    FrameSink,
    Netdev,
    PutBurst,
    burst_putter,
    nowait_receiver,
    sinks_of,
)
from vfiouser_virtio.backends.net.offload import BadOffload, check, complete, finish, needs
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.net_steering import Steering
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags, NetFeature
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio import Chain, Queue, Singles

Pieces = Iterator[Frame]
"""Frames, with memory of their own, that a packet was cut into."""
_TAKEN: Pieces = iter(())

BURST = 64
"""Packets that are sent together."""
AT_KICK, AT_KICK_BYTES = 2, 16 << 10
"""Packets, and bytes of them, that are sent in the call for a notification; for more the queue's task is woken.

A client may send 32 notifications before the other devices of its process have their turn.
"""
PING_PONG = 200e-6
"""Seconds since the notification before, at least, if so: packets that come faster are better sent together."""
# Bytes of a burst, but for the last packet: others of this process wait while they are copied, some 20 µs.
_MAX_BURST = 128 << 10
# Segments that are made of one packet in one go, some 0.5 ms: it may have 1000.
_AT_ONCE = 2 * BURST
_ROOM = itemgetter(2)
_TCP_HLEN, _UDP_HLEN = 20, 8
_ETH_HLEN = net.ETH_HLEN
_NEEDS_CSUM, _UDP_TUNNEL_CSUM = int(HdrFlags.NEEDS_CSUM), int(HdrFlags.UDP_TUNNEL_CSUM)
_TUNNEL_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID | HdrFlags.UDP_TUNNEL_CSUM)
_KIND = ~int(GsoType.ECN)
_TUNNELS = (int(GsoType.UDP_TUNNEL_IPV4), int(GsoType.UDP_TUNNEL_IPV6))
_GSO_TYPES = (
    (NetFeature.HOST_TSO4, GsoType.TCPV4),
    (NetFeature.HOST_TSO6, GsoType.TCPV6),
    (NetFeature.HOST_USO, GsoType.UDP_L4),
)


@dataclass(slots=True)
class TransmitQueue:
    """Transmit queue with its statistics (5.1.9.5.11.5), which grow until the device is reset."""

    queue: Queue
    pair: int
    sink: FrameSink
    """Where its packets go."""
    put_burst: PutBurst
    at_once: int = BURST
    """Packets that are tried together the next time: few where the last ones were of a kind that has to be cut."""
    kicked_at: float = 0.0
    """When it was last notified while nothing was to be sent, by ``perf_counter``."""
    packets: int = 0
    bytes: int = 0
    drops: int = 0
    drop_malformed: int = 0
    """Those among the drops for which the driver is at fault."""
    csum_none: int = 0
    needs_csum: int = 0
    gso_packets: int = 0
    gso_bytes: int = 0
    gso_segments: int = 0
    """Frames that those which were cut here have become."""
    gso_segments_bytes: int = 0
    gso_packets_noseg: int = 0
    """Those that the netdev has taken whole."""
    gso_bytes_noseg: int = 0

    def forget(self) -> None:
        """The device was reset."""
        for each in fields(self):
            if each.default == 0:
                setattr(self, each.name, each.default)


class Transmitter:
    """Transmission of the driver's packets to the netdev."""

    def __init__(self, queues: Sequence[Queue], netdev: Netdev, steering: Steering, log: DeviceLog) -> None:
        self.queues = [
            TransmitQueue(queue, pair, sink, burst_putter(sink))
            for pair, (queue, sink) in enumerate(zip(queues, sinks_of(netdev, len(queues)), strict=True))
        ]
        self.link = True
        """Packets are dropped while there is none."""
        self.drops = Drops()
        """Packets that did not get there; resets of the device do not change them."""
        self.steering = steering
        self.log = log
        self._frames = [Frame((), 0) for _ in range(BURST)]  # of a burst: to make one takes as long as five statements
        self.begin(0)

    def begin(self, features: int) -> None:
        """A driver has accepted these features."""
        self._codec = net.hdr_codec(features)
        self._flags = _NEEDS_CSUM if features & NetFeature.CSUM.mask else 0
        if features & NetFeature.HOST_UDP_TUNNEL_GSO.mask:
            self._flags |= _UDP_TUNNEL_CSUM  # which a packet that is not of a tunnel must not have
        allowed = {int(kind) for feature, kind in _GSO_TYPES if features & feature.mask}
        if features & NetFeature.HOST_ECN.mask:
            allowed |= {kind | GsoType.ECN for kind in allowed - {GsoType.UDP_L4}}
        self._gso_types = frozenset(allowed)
        tunnels = _TUNNELS if features & NetFeature.HOST_UDP_TUNNEL_GSO.mask else ()
        self._tunnel_types = frozenset(kind | tunnel for kind in allowed for tunnel in tunnels)
        self._tunnel_csum = bool(features & NetFeature.HOST_UDP_TUNNEL_GSO_CSUM.mask)

    def reset(self) -> None:
        """The driver has reset the device."""
        for each in self.queues:
            each.forget()
        self.begin(0)

    async def serve(self, transmitq: TransmitQueue) -> None:
        """Send what comes in one queue, until cancelled."""
        receive, send = nowait_receiver(transmitq.sink), lambda: self._send_at_kick(transmitq)
        async for burst in transmitq.queue.bursts(at_once=True, reap=receive, at_kick=send):
            sent, room = self._send_singles(transmitq)
            if not room:
                await transmitq.sink.wait_room()
            if sent or not room:
                continue
            held = self._send(transmitq, burst)
            del burst  # what was sent is shown now, not after the wait
            if held is not None:
                await self._wait_and_send(transmitq, *held)

    def _send_at_kick(self, transmitq: TransmitQueue) -> bool:
        """Send the few packets that a notification tells of, and say whether there are no others.

        In a ping-pong of packets a round of the event loop takes as long as all that is done here.
        """
        now = perf_counter()
        since, transmitq.kicked_at = now - transmitq.kicked_at, now
        if since < PING_PONG or not self.link or transmitq.at_once < BURST:
            return False
        singles = transmitq.queue.take_singles(AT_KICK + 1, writable=False)
        if singles is None:
            return self._send_one_at_kick(transmitq)
        if len(singles.buffers) > AT_KICK or sum(map(_ROOM, singles.buffers)) > AT_KICK_BYTES:
            singles.end(())
            return False
        sent, room = self._send_these(transmitq, singles)
        return sent > 0 and room

    def _send_one_at_kick(self, transmitq: TransmitQueue) -> bool:
        """As `_send_at_kick`, of one packet in several pieces, as most are that TCP has data in."""
        queue = transmitq.queue
        chain = queue.next_nowait()
        if chain is None:
            return False
        if (second := queue.next_nowait()) is not None:
            queue.put_back(second)
        elif self._send(transmitq, iter((chain,)), whole=True) is None:
            return True
        queue.put_back(chain)
        return False

    async def _wait_and_send(self, transmitq: TransmitQueue, chain: Chain, frame: Frame, pieces: Pieces | None) -> None:
        """Send what the netdev had no room for, and complete its chain."""
        sink = transmitq.sink
        if pieces is not None:
            for number, piece in enumerate(pieces):
                if not number % BURST:
                    await turns().wait()
                while not sink.put(piece):
                    await sink.wait_room()
        else:
            while not sink.put(frame):
                await sink.wait_room()
                if chain.stale:  # the frame is in memory that may have gone meanwhile
                    transmitq.queue.put_back(chain)
                    return
        self._count(transmitq, frame)
        chain.complete(0)

    def _send_singles(self, transmitq: TransmitQueue) -> tuple[int, bool]:
        """Send packets that come next, together, while each is one buffer and none is malformed or has to be cut.

        Returns how many, and whether the netdev has room for the next one.
        """
        singles = transmitq.queue.take_singles(transmitq.at_once, writable=False) if self.link else None
        return (0, True) if singles is None else self._send_these(transmitq, singles)

    def _send_these(self, transmitq: TransmitQueue, singles: Singles) -> tuple[int, bool]:
        """As `_send_singles`, of packets that were taken; those behind them go back."""
        steering, codec, size, view = self.steering, self._codec, self._codec.size, singles.readonly_view
        count = taken = octets = 0
        offloaded = False
        completed: list[int] = []
        try:
            for (_, start, room), frame in zip(singles.buffers, self._frames):  # noqa: B905 - strict takes longer
                frame.length = length = room - size
                if not _ETH_HLEN <= length <= MAX_FRAME or octets > _MAX_BURST:
                    break
                frame.segments = (view[start + size : start + room],)
                if view[start] or view[start + 1]:  # flags, gso_type
                    try:
                        self._read_header(frame, codec.unpack_from(view, start))
                        if frame.offload is not None and needs(frame.offload) & ~int(transmitq.sink.does):
                            if frame.offload.gso_type:
                                break
                            # A checksum alone, which most packets of a driver lack, is completed here.
                            frame.segments, frame.offload = (complete(frame, frame.offload),), None
                            completed.append(count)
                    except BadOffload:
                        break
                    offloaded = offloaded or frame.offload is not None
                else:
                    frame.offload = None
                if steering.learns:
                    steering.sent(frame, transmitq.pair)
                octets += length
                count += 1
            if count:
                taken = transmitq.put_burst(self._frames[:count])
        finally:
            transmitq.at_once = BURST if count == len(singles.buffers) else min(BURST, max(1, 4 * count))
            singles.end([0] * taken)
            # Else the memory of a client that goes would stay mapped until the next one sends as many.
            for frame in self._frames[: count + 1]:
                frame.segments = ()
        if offloaded:
            for frame in self._frames[:taken]:
                self._count(transmitq, frame)
        else:
            transmitq.packets += taken
            transmitq.csum_none += taken
            transmitq.bytes += octets if taken == count else sum(map(LENGTH, self._frames[:taken]))
        if completed:
            were_sent = bisect_left(completed, taken)
            transmitq.needs_csum += were_sent
            transmitq.csum_none -= were_sent
        return taken, taken == count

    def _send(
        self, transmitq: TransmitQueue, burst: Iterator[Chain], *, whole: bool = False
    ) -> tuple[Chain, Frame, Pieces | None] | None:
        """Send a burst; returns a packet for which the netdev has no room, and what is left of it if it was cut.

        ``whole``: or one that would have to be cut, of which nothing is sent then.

        A long function, since each call that it saves is a tenth of what a short packet takes.
        """
        put, codec, steering = transmitq.sink.put, self._codec, self.steering
        frame = Frame((), 0)  # for each in turn: to make one takes as long as five statements
        packets = octets = 0
        try:
            for chain in burst:
                fields, frame.segments, frame.length = chain.take_packet(codec)
                length = frame.length
                if not _ETH_HLEN <= length <= MAX_FRAME:
                    self._drop_malformed(transmitq, chain, f"a frame of {length:#x} bytes")
                    continue
                if fields[0] or fields[1]:
                    try:
                        self._read_header(frame, fields)
                    except BadOffload as error:
                        self._drop_malformed(transmitq, chain, str(error))
                        continue
                else:
                    frame.offload = None
                if not self.link:
                    transmitq.drops += 1
                    self.drops.add(Drop.LINK_DOWN)
                    chain.complete(0)
                    continue
                if steering.learns:
                    steering.sent(frame, transmitq.pair)
                if frame.offload is not None:
                    if whole and frame.offload.gso_type and needs(frame.offload) & ~int(transmitq.sink.does):
                        return chain, frame, None
                    try:
                        pieces = self._put_offloaded(transmitq, frame)
                    except BadOffload as error:  # the driver has changed it since it was looked at
                        self._drop_malformed(transmitq, chain, str(error))
                        continue
                    if pieces is not _TAKEN:
                        return chain, frame, pieces
                    self._count(transmitq, frame)
                elif put(frame):
                    packets += 1
                    octets += length
                else:
                    return chain, frame, None
                chain.complete(0)
        finally:
            transmitq.packets += packets
            transmitq.csum_none += packets
            transmitq.bytes += octets
        return None

    def _read_header(self, frame: Frame, fields: tuple[int, ...]) -> None:
        """Set what a packet's header says that is left to do. Raises BadOffload for what cannot be (5.1.9.2)."""
        flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = fields[:6]
        flags &= self._flags  # others are to be ignored
        if gso_type & _KIND:
            if gso_type in self._gso_types:
                least = csum_start + (_UDP_HLEN if gso_type == GsoType.UDP_L4 else _TCP_HLEN)
                hdr_len = min(max(hdr_len, least), frame.length)  # another guest is to be told the truth
                frame.offload = Offload(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)
            elif gso_type in self._tunnel_types:
                frame.offload = self._read_tunnel(frame.length, fields)
            else:
                raise BadOffload(f"gso_type {gso_type:#x}, which was not negotiated")
        elif flags:
            frame.offload = Offload(flags, 0, 0, 0, csum_start, csum_offset)
        else:
            frame.offload = None
        check(frame)

    def _read_tunnel(self, length: int, fields: tuple[int, ...]) -> Offload:
        """What the header of a packet in a tunnel says. Raises BadOffload."""
        flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _, _, _, _, outer_th, inner_nh = fields
        if flags & _UDP_TUNNEL_CSUM and not self._tunnel_csum:
            raise BadOffload(f"flags {flags:#x} have UDP_TUNNEL_CSUM, which was not negotiated")
        flags &= _TUNNEL_FLAGS
        least = csum_start + (_UDP_HLEN if gso_type & ~net.GSO_UDP_TUNNEL == GsoType.UDP_L4 else _TCP_HLEN)
        hdr_len = min(max(hdr_len, least), length)
        return Offload(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, outer_th, inner_nh)

    def _put_offloaded(self, transmitq: TransmitQueue, frame: Frame) -> Pieces | None:
        """Hand it over, or what it has to be cut into; returns `_TAKEN`, or what is left: there is no room for it, or
        others have their turn first; None for all of it.

        Raises BadOffload.
        """
        sink = transmitq.sink
        assert frame.offload is not None
        if not needs(frame.offload) & ~int(sink.does):
            return _TAKEN if sink.put(frame) else None
        pieces = self._cut(transmitq, frame)
        for _ in range(_AT_ONCE // BURST):
            some = list(islice(pieces, BURST))
            if not some:
                return _TAKEN
            taken = transmitq.put_burst(some)
            if taken < len(some):
                return chain_of(some[taken:], pieces)
        return pieces

    def _cut(self, transmitq: TransmitQueue, frame: Frame) -> Pieces:
        """What the netdev can take of a packet that it cannot; a copy, made when the first is asked for."""
        segmented = frame.offload is not None and frame.offload.gso_type
        for piece in finish(frame, transmitq.sink.does):
            if segmented:
                transmitq.gso_segments += 1
                transmitq.gso_segments_bytes += piece.length
            yield piece

    def _count(self, transmitq: TransmitQueue, frame: Frame) -> None:
        """It has been sent."""
        transmitq.packets += 1
        transmitq.bytes += frame.length
        offload = frame.offload
        if offload is None:
            transmitq.csum_none += 1
            return
        transmitq.needs_csum += 1
        if offload.gso_type:
            transmitq.gso_packets += 1
            transmitq.gso_bytes += frame.length
            if not needs(offload) & ~int(transmitq.sink.does):
                transmitq.gso_packets_noseg += 1
                transmitq.gso_bytes_noseg += frame.length

    def _drop_malformed(self, transmitq: TransmitQueue, chain: Chain, why: str) -> None:
        transmitq.drops += 1
        transmitq.drop_malformed += 1
        self.drops.add(Drop.MALFORMED)
        self.log.once("malformed packet", "the driver's packet is dropped: %s", why)
        chain.complete(0)
