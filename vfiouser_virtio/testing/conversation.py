"""Conversation of a vfio-user server and its clients, kept in readable lines for when a test fails.

::

    conversation = Conversation("blk0")
    Server(function, trace=conversation.record)
    print(conversation.text())

    blk0: 612 messages, the last 400 (seconds; → to the device, ← from it; with the answer if it came at once)
    …
       0.1041 → REGION_WRITE (no reply) BAR4+0x14 device_status = 0x0f
       0.1043 → REGION_READ BAR4+0x14 device_status = 0x0f
       0.1044 ← DMA_READ 0x100000080 = 0x00000001
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vfiouser_virtio.protocols.vfio_user import Command, Direction, MessageFlags
from vfiouser_virtio.serving.decode import NameOf, decode, virtio_register
from vfiouser_virtio.serving.trace import WordsOf
from vfiouser_virtio.vfio_user import Message

KEPT = 400
"""How many messages, or lines, are kept, the same one in a row as one: what led to a failure is at the end."""

_KEPT_BYTES = 1024  # of one message: what is shown, and what has structure, comes before the data of a disk
_ARROWS = {Direction.CLIENT_TO_SERVER: "→", Direction.SERVER_TO_CLIENT: "←"}
# Of a request and the answer behind it one says all that both say: the answer with these, the request with those.
_ANSWER_TELLS = frozenset(
    {
        Command.REGION_READ,
        Command.DMA_READ,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_IRQ_INFO,
    }
)
_REQUEST_TELLS = frozenset(
    {
        Command.REGION_WRITE,
        Command.DMA_WRITE,
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
    }
)


@dataclass(slots=True)
class _Said:
    when: float
    direction: Direction
    what: Message | str
    size: int
    times: int = 1

    def line(self, name_of: NameOf, words_of: WordsOf | None) -> str:
        if isinstance(self.what, str):
            return self.what
        # What was not kept is not shown either, but counts.
        whole = replace(self.what, body=bytes(self.what.body).ljust(self.size, b"\0"))
        words = words_of(whole) if words_of is not None else ()
        return decode(whole, name_of) + (f" ({'; '.join(words)})" if words else "")


class Conversation:
    """Newest messages of all connections to one server, or lines about carriers without messages.

    ``name_of`` names registers, by default those of a virtio device; ``words_of`` are the fields in a message.
    """

    def __init__(self, name: str, name_of: NameOf = virtio_register, words_of: WordsOf | None = None) -> None:
        self.name = name
        self._name_of, self._words_of = name_of, words_of
        self._count = 0
        self._start = time.monotonic()
        self._kept: deque[_Said] = deque(maxlen=KEPT)

    def record(self, direction: Direction, message: Message) -> None:
        """Keep a message: a `Trace` of a server or client. It is decoded only when it is to be read."""
        body = bytes(message.body[:_KEPT_BYTES])
        # Without its id, which says little in an order as strict as this: so that repetitions are seen as such.
        kept = Message(0, message.command, message.flags, message.error, body, list(message.fds))
        self._keep(direction, kept, len(message.body))

    def note(self, direction: Direction, line: str) -> None:
        """Keep a line that is text already."""
        self._keep(direction, line, 0)

    def lines(self) -> list[str]:
        """All that is kept, oldest first."""
        lines = []
        for said, shown in _fold(list(self._kept)):
            line = shown.line(self._name_of, self._words_of)
            again = f"   (× {said.times})" if said.times > 1 else ""
            lines.append(f"{said.when - self._start:9.4f} {_ARROWS[said.direction]} {line}{again}")
        return lines

    def text(self) -> str:
        """A heading, and the lines."""
        kept = sum(said.times for said in self._kept)
        heading = f"{self.name}: {self._count} messages"
        if kept < self._count:
            heading += f", the last {kept}"
        heading += " (seconds; → to the device, ← from it; with the answer if it came at once)"
        return "\n".join([heading, *self.lines()])

    def _keep(self, direction: Direction, what: Message | str, size: int) -> None:
        self._count += 1
        last = self._kept[-1] if self._kept else None
        if last is not None and (last.direction, last.what, last.size) == (direction, what, size):
            last.times += 1
        else:
            self._kept.append(_Said(time.monotonic(), direction, what, size))


def _fold(kept: list[_Said]) -> Iterator[tuple[_Said, _Said]]:
    """Each thing said, and what to show for it; an answer right behind its request is folded into that."""
    at = 0
    while at < len(kept):
        said = shown = kept[at]
        at += 1
        if at < len(kept) and _answers(said, kept[at]):
            if isinstance(said.what, Message) and said.what.command in _ANSWER_TELLS:
                shown = kept[at]
            at += 1
        yield said, shown


def _answers(said: _Said, answer: _Said) -> bool:
    request, reply = said.what, answer.what
    return (
        isinstance(request, Message)
        and isinstance(reply, Message)
        and said.direction is not answer.direction
        and request.command == reply.command
        and request.command in _ANSWER_TELLS | _REQUEST_TELLS
        and request.wants_reply
        and reply.is_reply
        and not reply.flags & MessageFlags.ERROR
        and said.times == answer.times == 1
    )
