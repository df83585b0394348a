"""State of a client on its server: version, memory, eventfds, which it tells only once; the next server must be told.

It is bounded by what the client may have: `MOST_MAPS` mappings, one eventfd a vector.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    DMA_UNMAP,
    IRQ_SET,
    Command,
    DmaUnmapFlags,
    IrqSetFlags,
    PciIrq,
)
from vfiouser_virtio.serving.keeper.mappings import MAPPINGS, messages
from vfiouser_virtio.vfio_user.wire.connection import MAX_MSG_FDS

_DMA_MAP, _DMA_UNMAP, _IRQ_SET = codec(DMA_MAP), codec(DMA_UNMAP), codec(IRQ_SET)
_UNMAP_ALL = int(DmaUnmapFlags.ALL)
_NONE, _EVENTFD = int(IrqSetFlags.DATA_NONE), int(IrqSetFlags.DATA_EVENTFD)
_MASK, _UNMASK = int(IrqSetFlags.ACTION_MASK), int(IrqSetFlags.ACTION_UNMASK)
_TRIGGER = int(IrqSetFlags.ACTION_TRIGGER)
_RESAMPLE = -1
"""In the place of a vector of INTx: the eventfd that tells of its end."""

MOST_VECTORS = 2048
"""Of an interrupt kind: PCI Express Base, "MSI-X Capability and Table Structure"."""
MOST_MAPS = 65536
"""One more than what VFIO allows (dma_entry_limit)."""

Told = tuple[int, bytes, list[int]]
"""Command (of `mappings` one), payload, and file descriptors, which stay this object's."""


@dataclass(slots=True)
class _File:
    fd: int
    users: int = 0


@dataclass(slots=True)
class ClientState:
    """State of one client: what was answered with success. It owns the file descriptors that it was given."""

    version: bytes | None = None
    """Payload of its VERSION."""
    _maps: dict[int, tuple[int, bytes, str]] = field(default_factory=dict)
    """By address: size, payload, and which file."""
    _files: dict[str, _File] = field(default_factory=dict)
    _irqs: dict[tuple[int, int], int] = field(default_factory=dict)
    _masked: set[tuple[int, int]] = field(default_factory=set)
    """Interrupts that the client itself has masked."""

    def note(self, command: int, payload: bytes, fds: list[int]) -> None:
        """A request has been answered with success; ``fds`` are this object's from now on.

        Raises ValueError for what no server may have taken.
        """
        try:
            self._note(command, payload, fds)
        except struct.error as error:
            close_all(fds)
            raise ValueError(str(error)) from None
        except ValueError:
            close_all(fds)
            raise

    def _note(self, command: int, payload: bytes, fds: list[int]) -> None:
        # What is wrong is found before any of the fds has come to be ours.
        if command == Command.VERSION:
            self.version = payload
        elif command == Command.DMA_MAP:
            self._map(payload, fds)
            return
        elif command == Command.DMA_UNMAP:
            self._unmap(payload)
        elif command == Command.DEVICE_SET_IRQS:
            self._set_irqs(payload, fds)
            return
        elif command == Command.DEVICE_RESET:
            self._masked.clear()
        close_all(fds)

    def told(self) -> Iterator[Told]:
        """The requests that bring another server to where the last one was, in order."""
        if self.version is None:
            return
        yield Command.VERSION, self.version, []
        for payload, fds in messages((payload, self._fd(file)) for _size, payload, file in self._maps.values()):
            yield MAPPINGS, payload, fds
        for index, vector, fds in self._vectors():
            flags, start = (_EVENTFD | _UNMASK, 0) if vector == _RESAMPLE else (_EVENTFD | _TRIGGER, vector)
            yield Command.DEVICE_SET_IRQS, _IRQ_SET.pack(_IRQ_SET.size, flags, index, start, len(fds)), fds
        for index, vector in self._masked:  # after the eventfds, which unmask
            yield Command.DEVICE_SET_IRQS, _IRQ_SET.pack(_IRQ_SET.size, _NONE | _MASK, index, vector, 1), []

    def _vectors(self) -> list[tuple[int, int, list[int]]]:
        """Kind and first vector of neighbours with an eventfd, as many as one message takes, and these."""
        runs: list[tuple[int, int, list[int]]] = []
        for (index, vector), fd in sorted(self._irqs.items()):
            before = runs[-1] if runs else (-1, 0, [])
            follows = vector > 0 and (index, vector) == (before[0], before[1] + len(before[2]))
            if not follows or len(before[2]) == MAX_MSG_FDS:
                runs.append((index, vector, []))
            runs[-1][2].append(fd)
        return runs

    def _fd(self, file: str) -> int:
        return self._files[file].fd if file else -1

    def fds(self) -> list[int]:
        """All that it owns."""
        return [*(file.fd for file in self._files.values()), *self._irqs.values()]

    def close(self) -> None:
        """The client has left."""
        close_all(self.fds())
        self._files.clear()
        self._irqs.clear()
        self._maps.clear()

    # ---- memory --------------------------------------------------------------------------------------------------

    def _map(self, payload: bytes, fds: list[int]) -> None:
        _argsz, _flags, _offset, address, size = _DMA_MAP.unpack_from(payload)
        if address in self._maps:
            raise ValueError(f"address {address:#x} has a mapping already")
        if len(self._maps) >= MOST_MAPS:
            raise ValueError(f"more than {MOST_MAPS:#x} mappings")
        file = ""
        if fds:
            close_all(fds[1:])
            file = _identity(fds[0])
            known = self._files.setdefault(file, _File(fds[0]))
            known.users += 1
            if known.fd != fds[0]:  # a guest's RAM comes in many pieces, and behind an IOMMU in thousands
                close_all(fds[:1])
        # A request may be 1 MiB long, all but its beginning without a meaning.
        self._maps[address] = size, bytes(payload[: _DMA_MAP.size]), file

    def _unmap(self, payload: bytes) -> None:
        _argsz, flags, address, size = _DMA_UNMAP.unpack_from(payload)
        end = 1 << 64 if flags & _UNMAP_ALL else address + size
        # A client that unmaps page by page has each at its own address; a range is looked for.
        whole = self._maps.get(address)
        if whole is not None and whole[0] == size:
            gone = [address]
        else:
            gone = [start for start, (length, _, _) in self._maps.items() if address <= start and start + length <= end]
        for start in gone:
            file = self._maps.pop(start)[2]
            if file:
                known = self._files[file]
                known.users -= 1
                if not known.users:
                    close_all([self._files.pop(file).fd])

    # ---- interrupts ----------------------------------------------------------------------------------------------

    def _set_irqs(self, payload: bytes, fds: list[int]) -> None:
        _argsz, flags, index, start, count = _IRQ_SET.unpack_from(payload)
        if count > MOST_VECTORS or start > MOST_VECTORS or len(fds) > count:
            raise ValueError(f"{len(fds)} file descriptors for {count:#x} vectors from {start:#x}")
        if flags & _UNMASK and flags & _EVENTFD and count > 1:
            raise ValueError(f"eventfds that unmask {count:#x} vectors; only INTx has one")
        replaced: list[int | None] = []
        if flags & _EVENTFD and flags & (_TRIGGER | _UNMASK):
            first = start if flags & _TRIGGER else _RESAMPLE
            replaced += [self._irqs.pop((index, place), None) for place in range(first, first + count)]
            for place, fd in enumerate(fds, first):
                self._irqs[index, place] = fd
                self._masked.discard((index, place))
            fds = []
        elif flags & _TRIGGER and flags & _NONE and not count:
            replaced = [self._irqs.pop(key) for key in [*self._irqs] if key[0] == index]
            self._masked = {key for key in self._masked if key[0] != index}
        elif flags & (_MASK | _UNMASK) and index == PciIrq.INTX:
            data = payload[_IRQ_SET.size :]
            chosen = {(index, start + place) for place in range(count) if flags & _NONE or any(data[place : place + 1])}
            self._masked = self._masked | chosen if flags & _MASK else self._masked - chosen
        close_all(fd for fd in [*replaced, *fds] if fd is not None)


def _identity(fd: int) -> str:
    """Which file it is, and how it is open: asks no file system that could hang. Of its own where that is not known."""
    with suppress(OSError, StopIteration):
        # A network interface's name, say, need not be UTF-8.
        with open(f"/proc/self/fdinfo/{fd}", errors="surrogateescape", newline="\n") as info:
            lines = dict(line.split(":", 1) for line in info if ":" in line)
        if "ino" in lines:  # Linux 5.14
            return " ".join(lines[name].strip() for name in ("mnt_id", "ino", "flags"))
    return f"fd {fd}"
