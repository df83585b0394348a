"""Netfilters, as QEMU calls them: netdevs before another one, past which all of its frames go.

::

    guest ──▶ device ──▶ put ─────▶ netdev.put ──▶ network
    guest ◀── device.put ◀── put_in ◀── netdev.run ◀── network
"""

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import Counters, Does, FrameSink, Netdev
from vfiouser_virtio.host_access import HostAccess, confine_all


class NetFilter:
    """`Netdev` before another one, which is what that is; subclasses have a say in `put` and `put_in`."""

    def __init__(self, netdev: Netdev) -> None:
        self.netdev = netdev

    @property
    def does(self) -> Does:
        return self.netdev.does

    @property
    def link(self) -> bool:
        return self.netdev.link

    @property
    def counters(self) -> Counters:
        return self.netdev.counters

    def describe(self) -> str:
        return self.netdev.describe()

    async def wait_link(self) -> None:
        await self.netdev.wait_link()

    def put(self, frame: Frame) -> bool:
        return self.netdev.put(frame)

    async def wait_room(self) -> None:
        await self.netdev.wait_room()

    def put_in(self, frame: Frame, device: FrameSink) -> bool:
        """`FrameSink.put` of a frame from the network, for the device."""
        return device.put(frame)

    async def run(self, device: FrameSink) -> None:
        await self.netdev.run(_Inward(self, device))

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`."""
        return confine_all([self.netdev])

    def close(self) -> None:
        self.netdev.close()


class _Inward:
    """`FrameSink` of the network's frames."""

    def __init__(self, netfilter: NetFilter, device: FrameSink) -> None:
        self._filter = netfilter
        self._device = device

    @property
    def does(self) -> Does:
        return self._device.does

    def put(self, frame: Frame) -> bool:
        return self._filter.put_in(frame, self._device)

    async def wait_room(self) -> None:
        await self._device.wait_room()
