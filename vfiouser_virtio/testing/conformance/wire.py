"""Connections to the server under test, and their timeouts."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from vfiouser_virtio.protocols.vfio_user import Command, MessageFlags
from vfiouser_virtio.protocols.virtio.device_type import Exercise
from vfiouser_virtio.testing.conformance.verdicts import note
from vfiouser_virtio.vfio_user import Client, ClientOptions, PrivateMemory, SharedMemory, connect

PAGE = 4096
FAR = 0x4000_0000_0000
"""An address where no check has memory."""
BOGUS = 1000
"""An index that no device has."""


async def refused(client: Client, command: Command, payload: bytes, why: str) -> None:
    """A request that is to be refused; notes where it is not."""
    reply = await client.exchange(command, payload)
    note(bool(reply.flags & MessageFlags.ERROR), f"{command.name} {why} was not refused")


@dataclass(frozen=True, slots=True)
class Wire:
    """Address of the server under test, and timeouts."""

    path: str | os.PathLike[str]
    timeout: float = 2.0
    """Seconds for a reply, a used buffer, the end of a reset."""
    settle: float = 0.05
    """Seconds in which what must not happen would have happened."""
    exercise: Exercise | None = None
    """What to ask the device for, in place of the exercise of its type."""
    peer: str | os.PathLike[str] | None = None
    """Where a second network device is served, of the same network as the one under test; see `at_peer`."""
    found: dict[str, int] = field(default_factory=dict, compare=False)
    """What a connection has found out that holds for all: ``device_type``."""

    def at_peer(self) -> "Wire":
        """The way to the peer, with the same timeouts."""
        assert self.peer is not None
        return replace(self, path=self.peer, peer=None, exercise=None, found={})

    @asynccontextmanager
    async def connect(
        self,
        options: ClientOptions | None = None,
        memory: Sequence[SharedMemory | PrivateMemory] = (),
    ) -> AsyncIterator[Client]:
        """One more client of the server, by default with the newest VERSION."""
        options = replace(options or ClientOptions(), timeout=self.timeout)
        async with connect(self.path, options=options, memory=memory) as client:
            yield client
