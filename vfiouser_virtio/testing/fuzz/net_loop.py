"""Network of one device, to which all that it sends comes back: so its receive path is fuzzed with what it sends.

Frames keep the offload header that the device has let through; what its driver does not take is done before that.
"""

from collections import deque

import trio

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, FrameSink
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import CtrlClass, CtrlRx, hdr_size
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Found

_ROOM = 8  # frames; a driver without receive buffers is not to make the others wait
_FRAME = (b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + b"\x88\xb5").ljust(60, b"\x5a")


class LoopNetdev(Link):
    """`Netdev` that sends back what it gets. It keeps the newest frames."""

    does = ALL

    def __init__(self) -> None:
        super().__init__("loop", link=True)
        self._frames: deque[Frame] = deque(maxlen=_ROOM)
        self._arrived = trio.lowlevel.ParkingLot()

    def put(self, frame: Frame) -> bool:
        self._frames.append(frame.copy())
        self._arrived.unpark_all()
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:
        self._frames.clear()
        while True:
            while not self._frames:
                await self._arrived.park()
            frame = self._frames.popleft()
            while not device.put(frame):
                await device.wait_room()

    def close(self) -> None:
        pass


def looped_net() -> Net:
    """A network device that offers everything, on such a network."""
    return Net(
        netdev=LoopNetdev(),
        queues=2,
        mtu=9000,
        speed=10_000,
        hash=True,
        host_tunnel=True,
        host_tunnel_csum=True,
        guest_tunnel=True,
        guest_tunnel_csum=True,
    )


async def looped_net_works(driver: FuzzDriver) -> None:
    """A command is answered, and a frame comes back, behind a header. Raises Found."""
    _, ack = await driver.request(4, [bytes([CtrlClass.RX, CtrlRx.PROMISC]), b"\1"], [1])
    if ack != b"\0":
        raise Found("broken", f"net: PROMISC is answered {ack.hex()}", "request")
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
