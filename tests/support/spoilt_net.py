"""Network device with seams for faults: what a driver's command does, what passes either way, and with which header."""

from typing import TypedDict

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import Does, FrameSink, Netdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.devices.net_control import Control
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_receive import Receiver
from vfiouser_virtio.devices.net_transmit import TransmitQueue, Transmitter
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HDR_HASH_CODEC, HDR_TUNNEL_CODEC, Ack
from vfiouser_virtio.virtio import Chain

OK, ERR = bytes([Ack.OK]), bytes([Ack.ERR])
Kind = tuple[int, int]
"""Class and command."""


class TunnelOptions(TypedDict):
    """Options of `Net` for UDP tunnels."""

    host_tunnel: bool
    host_tunnel_csum: bool
    guest_tunnel: bool
    guest_tunnel_csum: bool


TUNNELS = TunnelOptions(host_tunnel=True, host_tunnel_csum=True, guest_tunnel=True, guest_tunnel_csum=True)
"""All of them."""


class SpoiltControl(Control):
    """`Control` that asks the device what to do."""

    net: "SpoiltNet"

    def answer(self, chain: Chain) -> None:
        if not self.net.answers(chain):
            super().answer(chain)

    def perform(self, request: bytes, room: int) -> bytes:
        return self.net.perform((request[0], request[1] if len(request) > 1 else -1), request[2:], room)

    def original(self, kind: Kind, data: bytes, room: int) -> bytes:
        """As a device without a fault does it."""
        return super().perform(bytes(part for part in kind if part >= 0) + data, room)


class SpoiltReceiver(Receiver):
    """`Receiver` that asks the device what to pass on, and with which header."""

    net: "SpoiltNet"

    def begin(self, features: int, mtu: int | None) -> None:
        super().begin(features, mtu)
        self._plain = self._header(None, None)

    def put(self, frame: Frame) -> bool:
        passed = self.net.receives(frame)
        return True if passed is None else super().put(passed)

    def _header(self, offload: Offload | None, hashed: tuple[int, ...] | None, buffers: int = 1) -> bytes:
        packed = super()._header(offload, hashed, buffers)
        codec = next(each for each in (HDR_CODEC, HDR_HASH_CODEC, HDR_TUNNEL_CODEC) if each.size == len(packed))
        fields = codec.unpack(packed)
        placed = (*self.net.hash(*fields[7:9]), fields[9], *self.net.offsets(*fields[10:])) if fields[7:] else ()
        return codec.pack(*self.net.header(fields[:7]), *placed)


class SpoiltTransmitter(Transmitter):
    """`Transmitter` that shows the device what it sends."""

    net: "SpoiltNet"

    def _send_singles(self, transmitq: TransmitQueue) -> tuple[int, bool]:
        return 0, True  # all packets go the long way, by `_send`

    def _send_at_kick(self, transmitq: TransmitQueue) -> bool:
        return False

    def _read_header(self, frame: Frame, fields: tuple[int, ...]) -> None:
        super()._read_header(frame, self.net.reads(frame, fields))


class SpoiltNetdev:
    """`FrameSink` that asks the device what of its frames gets through."""

    def __init__(self, net: "SpoiltNet", netdev: FrameSink) -> None:
        self.net, self.netdev = net, netdev

    @property
    def does(self) -> Does:
        return self.netdev.does

    def put(self, frame: Frame) -> bool:
        passed = self.net.sends(frame)
        return True if passed is None else self.netdev.put(passed)

    async def wait_room(self) -> None:
        await self.netdev.wait_room()


class SpoiltNet(Net):
    """The network device of the checks; a fault overrides one of the methods that ask it."""

    receiver_class: type[SpoiltReceiver] = SpoiltReceiver
    transmitter_class: type[SpoiltTransmitter] = SpoiltTransmitter
    filter_class: type[ReceiveFilter] = ReceiveFilter

    def __init__(self, netdev: Netdev) -> None:
        super().__init__(netdev=netdev, queues=2, mtu=9000, speed=10_000, hash=True, **TUNNELS)
        settings = self.control.settings
        settings.filter = self.filter_class()
        self.spoilt_control = SpoiltControl(settings)
        self.spoilt_control.net = self
        self.control = self.spoilt_control
        receiver = self.receiver_class.__new__(self.receiver_class)
        receiver.net = self
        receiver.__init__([each.queue for each in self.receiver.queues], settings.filter, settings.steering, self.log)  # type: ignore[misc] # `begin` is called in it, and asks the device
        receiver.queues = self.receiver.queues  # whose counters the statistics show
        self.receiver = receiver
        transmitter = self.transmitter_class([], netdev, settings.steering, self.log)
        transmitter.net = self
        transmitter.queues = self.transmitter.queues
        for each in transmitter.queues:
            each.sink = SpoiltNetdev(self, each.sink)
        self.transmitter = transmitter
        self.spoil()

    def spoil(self) -> None:
        """Something else in the device that was made."""

    def show(self, bits: int) -> None:
        """Turn bits of ``status`` on."""
        self.config.set(status=self.control.settings.status | bits)

    # ---- control queue -------------------------------------------------------------------------------------------

    def answers(self, chain: Chain) -> bool:
        """Whether the fault has completed a chain of the control queue."""
        return False

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        """Answer a command: ack and result."""
        return self.good(kind, data, room)

    def good(self, kind: Kind, data: bytes, room: int) -> bytes:
        """The answer that the command should have."""
        return self.spoilt_control.original(kind, data, room)

    # ---- packets -------------------------------------------------------------------------------------------------

    def receives(self, frame: Frame) -> Frame | None:
        """What is passed on of a frame of the network."""
        return frame

    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """The first seven fields of a received packet's header."""
        return numbers

    def hash(self, value: int, report: int) -> tuple[int, int]:
        """hash_value and hash_report of a received packet."""
        return value, report

    def offsets(self, *offsets: int) -> tuple[int, ...]:
        """outer_th_offset and inner_nh_offset of a received packet, where it has them."""
        return offsets

    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        """The header of a packet to be sent."""
        return fields

    def sends(self, frame: Frame) -> Frame | None:
        """What gets to the network of a frame that is sent."""
        return frame
