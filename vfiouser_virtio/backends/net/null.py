"""Netdev that takes every frame and has none: a cable without a network."""

from collections.abc import Sequence

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import LENGTH, Frame
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

    def put_burst(self, frames: Sequence[Frame]) -> int:
        self.counters.tx_packets += len(frames)
        self.counters.tx_bytes += sum(map(LENGTH, frames))
        self.counters.tx_drops.add(Drop.NO_NETWORK, len(frames))
        return len(frames)

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:  # noqa: ARG002 - by name, for Netdev
        await trio.sleep_forever()

    async def wait_link(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        pass
