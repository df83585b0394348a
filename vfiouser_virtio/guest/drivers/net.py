"""Driver for the network device (virtio 1.4, 5.1): frames both ways, mergeable buffers, queue pairs, control commands.

::

    transmitq1 … transmitqN    header, frame                 `NetInterface.send`
    receiveq1 … receiveqN      buffers, filled one by one    `NetInterface.receive`
    controlq                   class, command, data, ack     `NetInterface.control`
"""

from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.drivers.console import Inbox
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net as wire
from vfiouser_virtio.protocols.virtio.net import CtrlClass, NetFeature

RECEIVE_BUFFERS, MERGEABLE_SIZE = 64, 2048
"""Of each pair. With MRG_RXBUF a long frame is spread over several."""
BIG_BUFFERS, BIG_SIZE = 16, 65562 + 32
"""Without MRG_RXBUF, but with segmentation offload: 5.1.9.3.1."""
MAX_PAIRS = 16
"""Pairs that are set up, however many a device has."""

_UNUSED = {
    NetFeature.GUEST_UFO,
    NetFeature.HOST_UFO,
    NetFeature.RSC_EXT,
    NetFeature.STANDBY,
    NetFeature.RSS_CONTEXT,
    NetFeature.HASH_TUNNEL,
    NetFeature.OUT_NET_HEADER,
    NetFeature.IPSEC,
}
_WANTED = sum(feature.mask for feature in NetFeature if feature not in _UNUSED)
_BIG = sum(
    feature.mask
    for feature in (NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6, NetFeature.GUEST_USO4, NetFeature.GUEST_USO6)
)


class NetHeader(NamedTuple):
    """Header of a packet (5.1.9); as it is, it says that nothing is left to be done."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0
    hash_value: int = 0
    hash_report: int = 0
    padding_reserved: int = 0
    outer_th_offset: int = 0
    inner_nh_offset: int = 0


COMPLETE = NetHeader()
_MQ_PAIRS, _MAC_TABLE = codec(wire.MQ_PAIRS), codec(wire.MAC_TABLE)


class Received(NamedTuple):
    """Frame from the device."""

    header: NetHeader
    data: bytes
    buffers: int
    """Over how many buffers it was spread."""


class NetInterface:
    """Network interface: ``driver_data`` of its device."""

    def __init__(self, device: VirtioDevice, transmit: Sequence[RequestQueue], receive: Sequence[Inbox]) -> None:
        self.device = device
        self.transmit = transmit
        self.inboxes = receive
        self.mac = bytes(wire.ETH_ALEN)
        """Zeros, where the device has given none."""
        self.controls: RequestQueue | None = None
        """None without CTRL_VQ."""
        self._codec = wire.hdr_codec(device.features)
        self._fields = len(self._codec.unpack(bytes(self._codec.size)))

    @property
    def pairs(self) -> int:
        """Queue pairs that there are; the first of them is active at first."""
        return len(self.transmit)

    # ---- frames ----------------------------------------------------------------------------------------------------

    async def send(self, frame: bytes, header: NetHeader = COMPLETE, *, pair: int = 0, pieces: int = 1) -> None:
        """Send a frame, cut into so many pieces; returns when the device has used it."""
        await self.transmit[pair].request(self._cut(frame, header, pieces))

    def post(self, frame: bytes, header: NetHeader = COMPLETE, *, pair: int = 0) -> None:
        """Send a frame without waiting for anything."""
        self.transmit[pair].post(self._cut(frame, header, 1))

    def _cut(self, frame: bytes, header: NetHeader, pieces: int) -> list[bytes]:
        packed = self._codec.pack(*header[: self._fields])
        size = -(-len(frame) // pieces) or 1
        return [packed, *(frame[at : at + size] for at in range(0, len(frame), size))]

    async def receive(self, *, pair: int = 0) -> Received:
        """The next frame; waits for it. Raises DeviceBroken for buffers that 5.1.9.4 does not allow."""
        first = await self._buffer(pair)
        size = self._codec.size
        if len(first) < size:
            raise self._broken(f"a buffer of {len(first):#x} bytes has no header")
        fields = self._codec.unpack_from(first)
        header = NetHeader(*fields)
        mergeable = self.device.has_feature(NetFeature.MRG_RXBUF)
        count = header.num_buffers
        if count == 0 or (count != 1 and not mergeable):
            raise self._broken(f"num_buffers is {count:#x}{'' if mergeable else ' without MRG_RXBUF'}")
        parts = [first[size:]]
        for _ in range(count - 1):
            if len(parts[-1]) + (size if len(parts) == 1 else 0) != MERGEABLE_SIZE:
                raise self._broken(f"buffer {len(parts)} of {count} is not full")
            parts.append(await self._buffer(pair))
        return Received(header, b"".join(parts), count)

    def receive_nowait(self, *, pair: int = 0) -> bool:
        """Whether `receive` has something to begin with."""
        return bool(self.inboxes[pair].filled)

    async def _buffer(self, pair: int) -> bytes:
        inbox = self.inboxes[pair]
        while (data := inbox.take()) is None:
            await self.device.wait(inbox.arrived)
        return data

    def _broken(self, what: str) -> DeviceBroken:
        return DeviceBroken(f"{self.device.name}: {what}", "5.1.9.4.1")

    # ---- control queue ---------------------------------------------------------------------------------------------

    async def control(self, kind: int, command: int, data: bytes = b"", *, room: int = 0) -> tuple[int, bytes]:
        """A command; its ack, and what the device has written before it, up to ``room`` bytes (5.1.9.5)."""
        assert self.controls is not None, "CTRL_VQ was not negotiated"
        sizes = [1, room] if room else [1]
        out = [wire.CTRL_HDR_CODEC.pack(kind, command), *([data] if data else [])]
        answer = await self.controls.request(out, sizes)
        reply = answer.data[1][: max(answer.written - 1, 0)] if room else b""
        return answer.data[0][0], reply

    async def set_pairs(self, pairs: int) -> int:
        """Use so many queue pairs; the ack."""
        data = _MQ_PAIRS.pack(pairs)
        return (await self.control(CtrlClass.MQ, wire.CtrlMq.VQ_PAIRS_SET, data))[0]

    async def set_rx_mode(self, mode: int, on: bool) -> int:
        """A receive mode, of `CtrlRx`; the ack."""
        return (await self.control(CtrlClass.RX, mode, bytes([on])))[0]

    async def set_addresses(self, unicast: Sequence[bytes], multicast: Sequence[bytes] = ()) -> int:
        """The MAC filtering tables; the ack."""
        tables = (_MAC_TABLE.pack(len(table)) + b"".join(table) for table in (unicast, multicast))
        return (await self.control(CtrlClass.MAC, wire.CtrlMac.TABLE_SET, b"".join(tables)))[0]

    # ---- configuration ---------------------------------------------------------------------------------------------

    async def link_is_up(self) -> bool:
        """What ``status`` says; without STATUS it is up (5.1.4.2)."""
        if not self.device.has_feature(NetFeature.STATUS):
            return True
        return bool(await self.device.config.get_int("status") & wire.Status.LINK_UP)

    def kick(self) -> None:
        """Show the device all receive buffers."""
        for inbox in self.inboxes:
            inbox.kick()

    def close(self) -> None:
        """The device has been reset."""
        for queue in [*self.transmit, *([self.controls] if self.controls else [])]:
            queue.close()
        for inbox in self.inboxes:
            inbox.close()


class NetDriver(VirtioDriver):
    """Driver that makes a `NetInterface` of each device."""

    name = "virtio_net"
    id_table = virtio_ids(wire.DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(_WANTED)
        several = device.has_feature(NetFeature.MQ) or device.has_feature(NetFeature.RSS)
        offered = await device.config.get_int("max_virtqueue_pairs") if several else 1
        size, count = MERGEABLE_SIZE, RECEIVE_BUFFERS
        if not device.has_feature(NetFeature.MRG_RXBUF) and device.features & _BIG:
            size, count = BIG_SIZE, BIG_BUFFERS
        transmit, receive = [], []
        for pair in range(min(offered, MAX_PAIRS)):
            inbox = Inbox(device, count, size)
            await inbox.open(f"receiveq{pair + 1}")
            receive.append(inbox)
            transmit.append(await RequestQueue.open(device, f"transmitq{pair + 1}"))
        interface = device.driver_data = NetInterface(device, transmit, receive)
        if device.has_feature(NetFeature.CTRL_VQ):
            # The last one (5.1.2): after all pairs that the device has, not only those that are used here.
            interface.controls = await RequestQueue.open(device, 2 * offered)
        if device.has_feature(NetFeature.MAC):
            mac = await device.config.get("mac")
            assert isinstance(mac, bytes)
            interface.mac = mac
        await device.ready()
        interface.kick()

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.close()


DRIVER = NetDriver
