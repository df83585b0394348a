"""Record of what QEMU said to one device while a guest booted: every message, and what came with it.

A file of gzipped JSON lines: the first says what was recorded, each other one is a message of the client,
``[command, flags, id, body, [what its descriptors were]]``. Answers are not kept, nor is the guest's memory.
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vfiouser_virtio.protocols.vfio_user import Direction
from vfiouser_virtio.vfio_user import Message, Trace

EVENTFD = "eventfd"
MEMFD = "memfd"
"""With a number: ``memfd0``, the first one that came."""


@dataclass(frozen=True)
class RecordedMessage:
    """Message of the client."""

    command: int
    flags: int
    id: int
    body: bytes
    fds: tuple[str, ...] = ()
    """What each descriptor was: ``eventfd``, or ``memfd0`` and so on."""


@dataclass
class BootRecord:
    """One connection, from VERSION to its end."""

    device: str
    """Name among `support.boot_devices.BOOT_DEVICES`."""
    qemu: str
    kernel: str
    memfds: list[int] = field(default_factory=list)
    """Their sizes, in bytes."""
    messages: list[RecordedMessage] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file; the same record is the same bytes."""
        heading = asdict(self)
        del heading["messages"]
        rows = [[each.command, each.flags, each.id, each.body.hex(), each.fds] for each in self.messages]
        text = "".join(json.dumps(line) + "\n" for line in (heading, *rows))
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))

    @staticmethod
    def load(path: Path) -> "BootRecord":
        """Read a file."""
        heading, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        record = BootRecord(**json.loads(heading))
        for line in lines:
            command, flags, message_id, body, fds = json.loads(line)
            record.messages.append(RecordedMessage(command, flags, message_id, bytes.fromhex(body), tuple(fds)))
        return record


def recording(record: BootRecord) -> Trace:
    """A trace that adds to the record what a client asks; replies to the server's own requests are left out."""
    inodes: list[int] = []

    def trace(direction: Direction, message: Message) -> None:
        if direction is Direction.CLIENT_TO_SERVER and not message.is_reply:
            kinds = tuple(_kind(fd, inodes, record.memfds) for fd in message.fds)
            body = bytes(message.body)
            record.messages.append(RecordedMessage(message.command, message.flags, message.id, body, kinds))

    return trace


def _kind(fd: int, inodes: list[int], sizes: list[int]) -> str:
    what = os.readlink(f"/proc/self/fd/{fd}")
    if "[eventfd]" in what:
        return EVENTFD
    assert what.startswith("/memfd:"), f"QEMU sends {what}: say here what it is"
    found = os.fstat(fd)
    if found.st_ino not in inodes:
        inodes.append(found.st_ino)
        sizes.append(found.st_size)
    return f"{MEMFD}{inodes.index(found.st_ino)}"


def make_fds(kinds: Sequence[str], memfd: Callable[[int], int]) -> list[int]:
    """Descriptors of these kinds, the caller's to close; ``memfd`` gives that of a number."""
    return [
        os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if kind == EVENTFD else os.dup(memfd(int(kind[len(MEMFD) :])))
        for kind in kinds
    ]
