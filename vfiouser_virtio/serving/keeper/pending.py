"""Requests to a device's process: those that it has been sent, and those behind them, which wait for its answers.

::

    change of registers: a write, a reset    sent with a number, when all before it are answered
    read, DMA_MAP, notification, …           sent at once, also behind it

After a death those without an answer are sent again: at most one change, which comes first, and of which the number
says whether it was made; what was read before it is answered, and what is behind it is read again.

Not all at once: a client behind a vIOMMU has thousands of mappings to be told of, each with a file descriptor. No more
of these can be on their way than a process may have open (unix(7), ETOOMANYREFS), and what waits for room in the
socket takes a copy of each.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.supervision.journal import ask
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

MOST_SENT = 64
"""Requests on their way to the process, together with their file descriptors."""
# What a request counts besides its bytes, and each of its file descriptors, as in `Backlog`.
_MESSAGE_COST, _FD_COST = 256, 64 * 1024

_NUMBERS = itertools.count(1)


@dataclass(slots=True)
class PendingRequest:
    """Request of the client, or of the keeper (``ours``), that was not answered."""

    id: int
    command: int
    data: bytes
    fds: list[int]
    quiet: bool
    """Nothing is sent to the client."""
    ours: bool = False
    changes: bool = False
    """It changes registers: it is not to be carried out twice."""
    number: int = 0
    """Of a change that was sent: the same for each process, and in no journal that of another one."""
    refused: bool = False
    """It is not for the process; ``data`` is its answer, which has its turn when all before it are answered."""

    @property
    def cost(self) -> int:
        """About how many bytes it takes."""
        return len(self.data) + _MESSAGE_COST + len(self.fds) * _FD_COST


class PendingRequests:
    """Queue of requests, which are answered in their order."""

    def __init__(self) -> None:
        self.cost = 0
        """About how many bytes all of them take."""
        self._sent: deque[PendingRequest] = deque()
        self._unsent: deque[PendingRequest] = deque()
        self._on_their_way = 0

    def __len__(self) -> int:
        return len(self._sent) + len(self._unsent)

    def __iter__(self) -> Iterator[PendingRequest]:
        yield from self._sent
        yield from self._unsent

    def put(self, asked: PendingRequest) -> None:
        """One more, behind all others."""
        self._unsent.append(asked)
        self.cost += asked.cost

    def begins_with(self, command: int) -> bool:
        """Whether the oldest one is such a request."""
        return bool(self) and next(iter(self)).command == command

    def send(self, device: MessageSocket, journal: int, only: int | None = None) -> None:
        """Send as many as may be on their way, and fit into the socket; ``only`` those of a command before others.

        The number of a change is in the device's ``journal`` before.
        """
        while self._unsent and self._on_their_way < MOST_SENT and not device.queued and not device.broken:
            if self._unsent[0].refused or (only is not None and self._unsent[0].command != only):
                break
            if self._unsent[0].changes and self._sent:
                break
            asked = self._unsent.popleft()
            if asked.changes:
                asked.number = asked.number or next(_NUMBERS)
                ask(journal, asked.number)
            self._sent.append(asked)
            self._on_their_way += 1 + len(asked.fds)
            device.send(asked.data, asked.fds)

    def answered(self, request_id: int, command: int) -> PendingRequest | None:
        """The oldest one, which is answered; None where that has not been sent, or is another one."""
        if not self._sent or (self._sent[0].id, self._sent[0].command) != (request_id, command):
            return None
        asked = self._sent.popleft()
        self._on_their_way -= 1 + len(asked.fds)
        self.cost -= asked.cost
        return asked

    def refusals(self) -> Iterator[bytes]:
        """Answers of the oldest ones, as far as these are refused."""
        while not self._sent and self._unsent and self._unsent[0].refused:
            asked = self._unsent.popleft()
            self.cost -= asked.cost
            yield asked.data

    def send_again(self) -> None:
        """The process has died: none was sent to the next one. Those of the keeper's own are forgotten."""
        kept = [asked for asked in self if not asked.ours]
        self._sent.clear()
        self._unsent = deque(kept)
        self._on_their_way = 0
        self.cost = sum(asked.cost for asked in kept)

    def close(self) -> None:
        """Close the file descriptors of all that are left."""
        for asked in self:
            close_all(asked.fds)
