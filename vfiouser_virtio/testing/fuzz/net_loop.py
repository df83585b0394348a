"""Network of one device, to which all that it sends comes back: so its receive path is fuzzed with what it sends.

Frames keep the offload header that the device has let through; what its driver does not take is done before that. They
go the way of those of a hub: by an outlet, which finishes and keeps them, all that have come at a time. The
offloads that it takes change from frame to frame, so that the device has packets to cut, and checksums to complete.
"""

from collections import deque

import trio

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, Does, FrameSink, Netdev
from vfiouser_virtio.backends.net.offload import BadOffload
from vfiouser_virtio.backends.net.outlet import Outlet
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import CtrlClass, CtrlRx, hdr_size
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Found

_ROOM = 8  # frames; a driver without receive buffers is not to make the others wait
_DOES = ALL, Does(0), ALL, Does.CSUM
_FRAME = (b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + b"\x88\xb5").ljust(60, b"\x5a")


class LoopNetdev(Link):
    """`Netdev` that sends back what it gets. It keeps the newest frames."""

    def __init__(self) -> None:
        super().__init__("loop", link=True)
        self._seen = 0
        self._frames: deque[Frame] = deque(maxlen=_ROOM)
        self._arrived = trio.lowlevel.ParkingLot()

    @property
    def does(self) -> Does:
        """See `FrameSink`."""
        return _DOES[self._seen % len(_DOES)]

    def put(self, frame: Frame) -> bool:
        self._seen += 1
        self._frames.append(frame.copy())
        self._arrived.unpark_all()
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:
        self._frames.clear()
        outlet = Outlet(self.counters)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outlet.run, device)
            await trio.lowlevel.checkpoint()  # it has the device before there is a frame
            while True:
                while not self._frames:
                    await self._arrived.park()
                burst = list(self._frames)
                self._frames.clear()
                if self._seen % 3:
                    await self._send_back(outlet, burst)
                    continue
                for frame in burst:  # as those of a netdev that knows no offloads of the device's
                    while not device.put(frame):
                        await device.wait_room()

    @staticmethod
    async def _send_back(outlet: Outlet, burst: list[Frame]) -> None:
        while burst:
            try:
                taken = outlet.take_burst(burst)
            except BadOffload:  # the device has let it through, as of its driver
                taken = 1
            del burst[:taken]
            if not taken:
                await outlet.wait_room()

    def close(self) -> None:
        pass


def looped_net() -> Net:
    """A network device that offers everything, on such a network."""
    return net_with_everything(LoopNetdev())


def net_with_everything(netdev: Netdev) -> Net:
    """A network device that offers everything."""
    return Net(
        netdev=netdev,
        queues=2,
        mtu=9000,
        speed=10_000,
        hash=True,
        host_tunnel=True,
        host_tunnel_csum=True,
        guest_tunnel=True,
        guest_tunnel_csum=True,
    )


async def be_promiscuous(driver: FuzzDriver) -> None:
    """Take frames to whatever address. Raises Found where the command is not answered, or refused."""
    _, ack = await driver.request(4, [bytes([CtrlClass.RX, CtrlRx.PROMISC]), b"\1"], [1])
    if ack != b"\0":
        raise Found("broken", f"net: PROMISC is answered {ack.hex()}", "request")


async def looped_net_works(driver: FuzzDriver) -> None:
    """A command is answered, and a frame comes back, behind a header. Raises Found."""
    await be_promiscuous(driver)
    size = hdr_size(driver.features)
    offered = driver.offer(0, [], [2048])
    assert offered is not None
    head, [address] = offered
    await driver.kick(0)
    await driver.request(1, [bytes(size), _FRAME], [])
    length = await driver.wait_used(driver.rings[0], head)
    frame = driver.ram.read(address + size, len(_FRAME))
    if length != size + len(_FRAME) or frame != _FRAME:
        raise Found("broken", f"net: {length} bytes come back of {size + len(_FRAME)}, or other ones", "request")
