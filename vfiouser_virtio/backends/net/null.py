"""Netdev that takes every frame and has none: a cable without a network."""

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import ALL, Counters, FrameSink


class NullNetdev:
    """`Netdev` that drops what the guest sends; its link is up."""

    does = ALL

    def __init__(self) -> None:
        self.link = True
        self.counters = Counters()

    def describe(self) -> str:
        return "null"

    def put(self, frame: Frame) -> bool:
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        self.counters.tx_drops.add(Drop.NO_NETWORK)
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:  # noqa: ARG002 - by name, for Netdev
        await trio.sleep_forever()

    async def wait_link(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        pass
