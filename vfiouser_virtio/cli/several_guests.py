"""Several guests of one ``run``: they wait for each other, and the lines of each say whose they are."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vfiouser_virtio.cli.exit_status import OutputError
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.serving.terminal import write_patiently

MAX_GUESTS = 32
"""Each takes half a gigabyte and most of a CPU."""
NETWORK = "192.168.77.{}"
"""Address of a guest by its number, as `vm/guest/rc` sets it."""
# A line that has no end is printed in pieces of so many bytes.
_LONGEST = 64 << 10


class Rendezvous:
    """Point that ``count`` tasks reach before any of them goes on."""

    def __init__(self, count: int) -> None:
        import trio

        self._missing = count
        self._all_here = trio.Event()

    async def meet(self) -> None:
        """Wait for the others."""
        self._missing -= 1
        if not self._missing:
            self._all_here.set()
        await self._all_here.wait()


@dataclass(frozen=True, slots=True)
class GuestPlace:
    """One of several guests."""

    number: int
    """From 1."""
    prefix: str
    """Of its lines."""
    booted: Rendezvous
    ended: Rendezvous
    """Its command has ended, and those of the others may still need it."""


class Output:
    """Output of a guest's command, on our own streams; with a prefix, line by line."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._rest = {1: b"", 2: b""}

    async def take(self, stream: int, data: bytes) -> None:
        """A piece of stream 1 or 2. Raises OutputError."""
        if not self._prefix:
            await _print(stream, data)
            return
        *lines, rest = (self._rest[stream] + data).split(b"\n")
        if len(rest) > _LONGEST:
            lines, rest = [*lines, rest], b""
        self._rest[stream] = rest
        if lines:
            await _print(stream, b"".join(self._prefix + line + b"\n" for line in lines))

    async def end(self) -> None:
        """Print what has no end of line. Raises OutputError."""
        for stream, rest in self._rest.items():
            if rest:
                await _print(stream, self._prefix + rest + b"\n")


async def _print(stream: int, data: bytes) -> None:
    try:
        await write_patiently(stream, data)
    except OSError as error:
        raise OutputError(f"cannot write to {('stdout', 'stderr')[stream - 1]}: {error.strerror}") from None


@asynccontextmanager
async def one_error() -> AsyncIterator[None]:
    """What one of the guests raised, without the group around it: the first of what several did."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise next(leaves(group)) from None
