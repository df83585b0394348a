"""Fault injection into a client's messages: whole, in pieces, altered, late, twice, or not at all."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from vfiouser_virtio.vfio_user.wire.connection import Message

Piece: TypeAlias = tuple[bytes, Sequence[int]] | float
"""Bytes for one ``sendmsg`` and the fds that ride on their first one; or a pause, in seconds."""


class Chaos(Protocol):
    """Faults to inject: subclass it and override what shall go wrong; what is not overridden goes right.

    ::

        class Twice(Chaos):
            def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterable[Piece]:
                return [(message, fds), (message, fds)]

        async with connect(path, options=ClientOptions(chaos=Twice())) as client: ...
    """

    def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterable[Piece]:
        """What is sent in place of one message, header and all. A generator runs as far as has been sent.

        Later messages wait until it has ended. ``fds`` stay open as long; added ones are the caller's to close.
        """
        return [(message, fds)]

    def dma_reply(self, request: Message, reply: bytes) -> Iterable[bytes | float]:
        """The replies to one DMA_READ or DMA_WRITE, each a whole message, which then goes through `outgoing`.

        A pause (seconds) holds up nothing else. ``reply`` is the right one; ``request`` is the server's message.
        """
        del request
        return [reply]


def pieces(message: bytes, fds: Sequence[int] = (), size: int = 1, pause: float = 0.0) -> Iterator[Piece]:
    """One message cut into ``size`` bytes each, with pauses in between; for `Chaos.outgoing`."""
    for start in range(0, len(message), size):
        if start:
            yield pause
        yield message[start : start + size], () if start else fds
