"""Devices that are attacked, and answer when a test wants them to."""

import trio

from vfiouser_virtio.testing.fuzz.targets import Echo
from vfiouser_virtio.virtio import Chain, Queue


class Keeper(Echo):
    """Device that keeps whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []

    def reset(self) -> None:
        self.kept.clear()

    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            if chain.readable.length and chain.readable.read()[:1] == b"K":
                self.kept.append(chain)
            else:
                chain.writable.write(b"ping"[: chain.writable.length])
                chain.complete()


class Gated(Echo):
    """Device that answers when its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()

    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            await self.gate.wait()
            chain.writable.write(chain.readable.read())
            chain.complete()
