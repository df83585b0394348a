"""Frames that are read, or copied, straight into the buffers of a network device's driver, without a netdev."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.net_buffers import RX, add
from support.net_cable import Cable, a_frame

from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.backends.net.netdev import Read, burst_copier, burst_reader
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, NetFeature
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.virtio import Offer

SIZE = HDR_CODEC.size
BURST = 64
MERGEABLE = NetFeature.MRG_RXBUF.mask


class Wire:
    """A socket that is read as an interface is: a frame with its header for each read, and the rest of it is lost."""

    def __init__(self) -> None:
        self._host, self.guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.guest.setblocking(False)
        self.scratch = memoryview(bytearray(1 << 17))

    def send(self, *frames: bytes, offload: Offload | None = None) -> None:
        """``num_buffers`` is not written by a kernel: it must not be what the driver sees."""
        for frame in frames:
            self._host.send(HDR_CODEC.pack(*(offload or (0,) * 6)[:6], 0xAAAA) + frame)

    def read(self, net: Net, limit: int = BURST, size: int = SIZE) -> Read | None:
        reader = burst_reader(net.receiver)
        assert reader is not None
        return reader(self.guest.fileno(), size, limit, self.scratch)

    def close(self) -> None:
        self._host.close()
        self.guest.close()


@asynccontextmanager
async def driven(net: Net, features: int = MERGEABLE) -> AsyncIterator[Driver]:
    """With a driver whose memory has been looked at."""
    packed = bool(features & Feature.RING_PACKED.mask)
    assert isinstance(net.netdev, Cable)
    async with running(net, features=features, offer=Offer(packed=packed)) as driver:
        tokens = add(driver, 1526, 1526)
        await net.netdev.deliver(a_frame(60))
        await driver.wait(RX, tokens[0])
        await net.netdev.deliver(a_frame(60))
        await driver.wait(RX, tokens[1])
        yield driver


def header(offload: Offload | None = None) -> bytes:
    return HDR_CODEC.pack(*(offload or (0,) * 6)[:6], 1)


def done(read: Read | None, frames: int, octets: int) -> bool:
    """Whether that was all that was to be read, and nothing was left."""
    assert read is not None
    assert read.room
    assert (read.frames, read.octets) == (frames, octets)
    return read.left is None and isinstance(read.end, BlockingIOError)


def copy(net: Net, *frames: bytes) -> int:
    """With something between them, as on a wire."""
    copier = burst_copier(net.receiver)
    assert copier is not None
    spans, at = [], 0
    for frame in frames:
        at += 4
        spans.append((at, len(frame)))
        at += len(frame)
    return copier(memoryview(b"".join(b"\xff" * 4 + frame for frame in frames)), spans)
