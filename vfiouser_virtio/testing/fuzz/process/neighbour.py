"""Honest neighbour: a client of an entropy device in the attacked process, and what it notices of the attack."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.testing.fuzz.deadline import Deadline
from vfiouser_virtio.testing.fuzz.process.server import ServerUnderAttack, waited_for_cpu
from vfiouser_virtio.testing.raw.blocking import BlockingClient
from vfiouser_virtio.testing.raw.ring import WRITE

RAM = 1 << 20
NO_ANSWER = 20.0
"""Seconds after which a register counts as never answered: nothing of what a server does takes as long.

Waits of both sides for a CPU are left out.
"""
_ROOM = 64
_RINGS_END = 0x1_0000
_BUFFER = 0x2_0000
# Bytes that hardly a device would write by accident, different from page to page.
_CANARY = (bytes(range(1, 252)) * (RAM // 251))[: RAM - _RINGS_END]
_PAUSE = 0.0005  # between two looks at a register, as a guest does something else meanwhile
_EACH = 20  # looks between two requests


@dataclass(slots=True)
class RoundTrips:
    """Durations of register accesses in seconds, less the waits of both sides for a CPU."""

    served: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return sorted(self.served)[len(self.served) // 2] if self.served else 0.0

    def longer(self, than: float) -> list[float]:
        return sorted((one for one in self.served if one > than), reverse=True)


class PatientSocket(socket.socket):
    """UNIX socket that does not give up at a timeout, but when a ``limit`` that it has made then is over, too.

    A reply costs no look at limits this way.
    """

    def __init__(self, limit: Callable[[], Deadline]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._limit = limit

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        limit: Deadline | None = None
        while True:
            try:
                return super().recv(bufsize, flags)
            except TimeoutError:
                limit = limit or self._limit()
                if limit.over():
                    raise


class NeighbourError(Exception):
    """Harm that the neighbour has come to."""


class Neighbour:
    """Client of the entropy device behind a socket, with canaries all around its buffers. A context manager.

    Raises TimeoutError and OSError where the server does not answer, `NeighbourError` where it answers wrongly.
    """

    def __init__(self, server: ServerUnderAttack, path: str) -> None:
        self._server = server
        sock = PatientSocket(self._limit)
        self._client = BlockingClient(path, memory=SharedMemory(RAM, address=0), timeout=NO_ANSWER, sock=sock)
        self._client.start()
        self._client.ram.write(_RINGS_END, _CANARY)
        self._looks = 0
        self._number = 0
        self._owed: int | None = None

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look(self, seen: RoundTrips) -> None:
        """Read a register, and now and then ask for random bytes, or look whether they have come."""
        waited = self._waited()
        begun = time.perf_counter()
        self._client.status()
        took = time.perf_counter() - begun
        seen.served.append(max(took - (self._waited() - waited), 0.0))
        self._looks += 1
        if self._looks % _EACH == 0:
            self._request()
        time.sleep(_PAUSE)

    def watch(self, seconds: float) -> RoundTrips:
        """`look` for so long."""
        seen = RoundTrips()
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(seen.served) < _EACH:
            self.look(seen)
        return seen

    def finish(self) -> None:
        """One more request must be answered. Raises NeighbourError."""
        self._request()
        limit = self._limit()
        while self._owed is not None:
            if limit.over():
                raise NeighbourError("a request of the neighbour's is not answered")
            self._client.status()
            self._collect()
            time.sleep(_PAUSE)
        ram = self._client.ram
        if ram.read(_RINGS_END, RAM - _RINGS_END) != _CANARY:
            raise NeighbourError("memory of the neighbour's has changed outside of its buffers")

    def _request(self) -> None:
        """A request, when the one before is answered."""
        self._collect()
        if self._owed is not None:
            return
        ring = self._client.ring
        ring.describe(0, (_BUFFER, _ROOM, WRITE, 0))
        self._owed = (ring.used_idx + 1) & 0xFFFF
        ring.offer(0)
        self._client.kick()

    def _collect(self) -> None:
        ring = self._client.ring
        if self._owed is None or ring.used_idx != self._owed:
            return
        self._owed = None
        element = ring.used_element(self._number)
        if element != (0, _ROOM):
            raise NeighbourError(f"the neighbour's request has come back as {element}, not (0, {_ROOM})")
        before = _CANARY[_BUFFER - _RINGS_END :][:_ROOM]
        if self._client.ram.read(_BUFFER, _ROOM) == before:
            raise NeighbourError("the neighbour's request was answered without data")
        self._client.ram.write(_BUFFER, before)
        self._number += 1

    def _limit(self) -> Deadline:
        return Deadline(NO_ANSWER, self._waited, at_once=True)

    def _waited(self) -> float:
        return self._server.waited_seconds() + waited_for_cpu(os.getpid())
