"""Client of a bridge (`pci.bridge`) in a simulator: registers to answer, memory to reach, interrupts to raise.

::

    with connect_to_bridge("/run/card.sock") as bridge:        # a device in Python, without any simulator
        while True:
            request = bridge.wait_request()
            if request.kind is RtlMessage.READ:
                bridge.reply(request, bytes(request.count))
            else:
                bridge.reply(request)

All calls are blocking but those that say otherwise: while one waits, nothing of the simulated time passes.
"""

import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vfiouser_virtio.protocols.rtl_bridge import (
    ACCESS_CODEC,
    DESCRIPTION_CODEC,
    DMA_CODEC,
    HEADER_CODEC,
    HELLO_CODEC,
    INTERRUPT_CODEC,
    MAGIC,
    MAX_DMA,
    MAX_MESSAGE,
    MAX_REASON,
    REPLY,
    VERSION,
    InterruptAction,
    RtlMessage,
    RtlStatus,
    pack_message,
)

_RETRY_S = 0.05


class BridgeEnded(Exception):
    """End of the bridge: the device is no longer served, or it did not like what was sent."""


class DmaRefused(Exception):
    """Access of guest memory that cannot be: a master on a bus gets SLVERR. ``status`` says why."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: {RtlStatus(status).name if status in set(RtlStatus) else hex(status)}")
        self.status = status


class BridgeDescription(NamedTuple):
    """Device as the guest sees it."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    interrupts: int
    bar_sizes: tuple[int, ...]
    """Bytes of BAR 0 to 5; 0 for one that is absent."""


@dataclass(frozen=True, slots=True)
class BridgeRequest:
    """READ, WRITE or RESET of the bridge, to be answered with `BridgeClient.reply`, in order.

    An access has ``count`` bytes, 1, 2, 4 or 8, at ``offset`` of BAR ``bar``, a multiple of that.
    """

    kind: RtlMessage
    number: int
    bar: int = 0
    offset: int = 0
    count: int = 0
    data: bytes = b""


@dataclass(slots=True)
class DmaTransfer:
    """Access of guest memory that was begun; ``status`` is None until it has ended."""

    what: str
    status: int | None = None
    data: bytes = b""

    def result(self) -> bytes:
        """What was read, when it has ended. Raises DmaRefused."""
        assert self.status is not None, "it has not ended"
        if self.status != RtlStatus.OK:
            raise DmaRefused(self.what, self.status)
        return self.data


@dataclass(slots=True)
class BridgeClient:
    """Simulator's end of a connection: see `connect_to_bridge`. Methods raise BridgeEnded when the bridge ends it."""

    socket: socket.socket
    hello_timeout: float | None = None
    """Seconds for the answer to HELLO; None: no end."""
    description: BridgeDescription = field(init=False)
    requests: deque[BridgeRequest] = field(default_factory=deque)
    """Those that have come, the oldest first."""
    _transfers: dict[int, DmaTransfer] = field(default_factory=dict)
    _received: bytearray = field(default_factory=bytearray)
    _number: int = 0
    _ended: str = ""

    def __post_init__(self) -> None:
        self.socket.sendall(pack_message(RtlMessage.HELLO, 0, HELLO_CODEC.pack(MAGIC, VERSION)))
        end = None if self.hello_timeout is None else time.monotonic() + self.hello_timeout
        while (message := self._next()) is None:
            if end is not None and time.monotonic() >= end:
                raise BridgeEnded(
                    f"the bridge has not answered HELLO for {self.hello_timeout:g} s: it serves one simulator at a "
                    "time; is another one connected?"
                )
            self._receive(None if end is None else max(end - time.monotonic(), _RETRY_S))
        kind, status, _number, body = message
        if kind != RtlMessage.HELLO | REPLY or status != RtlStatus.OK or len(body) != DESCRIPTION_CODEC.size:
            raise BridgeEnded(f"the bridge refuses HELLO of version {VERSION}, status {status:#x}")
        _version, vendor, device, subsystem_vendor, subsystem, class_code, interrupts, *sizes = (
            DESCRIPTION_CODEC.unpack(body)
        )
        self.description = BridgeDescription(
            vendor, device, subsystem_vendor, subsystem, class_code, interrupts, tuple(sizes)
        )

    # ---- requests of the bridge ------------------------------------------------------------------------------------

    def wait_request(self) -> BridgeRequest:
        """The next request: wait for it, and take it."""
        while not self.requests:
            self.pump(None)
        return self.requests.popleft()

    def reply(self, request: BridgeRequest, data: bytes = b"", status: int = RtlStatus.OK) -> None:
        """Answer a request: with ``count`` bytes for a READ, none for others or with another status than OK.

        Raises ValueError for another number of bytes.
        """
        expected = request.count if request.kind is RtlMessage.READ and status == RtlStatus.OK else 0
        if len(data) != expected:
            raise ValueError(
                f"{len(data)} bytes in reply to {request.kind.name} {request.number:#x}: expected {expected}"
            )
        self._send(pack_message(request.kind | REPLY, request.number, data, status))

    def pump(self, timeout: float | None) -> None:
        """Wait for messages, for ``timeout`` seconds (0: take what is there; None: until some come), and sort them in:
        `requests`, and the transfers that have ended."""
        if self._ended:
            raise BridgeEnded(self._ended)
        message = self._next()
        if message is None:
            self._receive(timeout)
            message = self._next()
        while message is not None:
            self._sort_in(*message)
            message = self._next()

    # ---- requests to the bridge ------------------------------------------------------------------------------------

    def begin_read(self, address: int, count: int) -> DmaTransfer:
        """Begin to read guest memory, `MAX_DMA` bytes at most; `pump` ends it. Does not wait."""
        return self._begin(RtlMessage.DMA_READ, address, count, b"")

    def begin_write(self, address: int, data: bytes) -> DmaTransfer:
        """Begin to store to guest memory, `MAX_DMA` bytes at most; `pump` ends it. Does not wait."""
        return self._begin(RtlMessage.DMA_WRITE, address, len(data), data)

    def dma_read(self, address: int, count: int) -> bytes:
        """Read guest memory. Requests that come meanwhile wait in `requests`. Raises DmaRefused."""
        return self._wait(self.begin_read(address, count))

    def dma_write(self, address: int, data: bytes) -> None:
        """Store to guest memory; returns when it is there. As `dma_read`."""
        self._wait(self.begin_write(address, data))

    def interrupt(self, vector: int, action: InterruptAction = InterruptAction.TRIGGER) -> None:
        """Raise, lower or trigger an interrupt: see `InterruptAction`."""
        self._send(pack_message(RtlMessage.INTERRUPT, 0, INTERRUPT_CODEC.pack(vector, action)))

    def end(self, why: str) -> None:
        """Say that the simulation has ended, as planned, and close the socket."""
        try:
            self._send(pack_message(RtlMessage.END, 0, why.encode()[:MAX_REASON]))
        except BridgeEnded:
            pass
        self.socket.close()

    def _begin(self, kind: RtlMessage, address: int, count: int, data: bytes) -> DmaTransfer:
        if not 0 < count <= MAX_DMA:
            raise ValueError(f"{count:#x} bytes at once; 1 to {MAX_DMA:#x} can be")
        self._number = (self._number + 1) & 0xFFFF_FFFF
        transfer = self._transfers[self._number] = DmaTransfer(f"{kind.name} of {count:#x} bytes at {address:#x}")
        self._send(pack_message(kind, self._number, DMA_CODEC.pack(address, count) + data))
        return transfer

    def _wait(self, transfer: DmaTransfer) -> bytes:
        while transfer.status is None:
            self.pump(None)
        return transfer.result()

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        if self._ended:
            raise BridgeEnded(self._ended)
        self.socket.settimeout(None)
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise self._end(f"the bridge is gone: {error.strerror}") from None

    def _receive(self, timeout: float | None) -> None:
        self.socket.settimeout(timeout or None)
        try:
            data = self.socket.recv(MAX_MESSAGE, 0 if timeout != 0 else socket.MSG_DONTWAIT)
        except (BlockingIOError, TimeoutError):
            return
        except OSError as error:
            raise self._end(f"the bridge is gone: {error.strerror}") from None
        if not data:
            raise self._end("the bridge has closed its socket")
        self._received += data

    def _next(self) -> tuple[int, int, int, bytes] | None:
        """RtlMessage, status, id and body of the next message that is complete."""
        if len(self._received) < HEADER_CODEC.size:
            return None
        size, kind, status, number = HEADER_CODEC.unpack_from(self._received)
        if not HEADER_CODEC.size <= size <= MAX_MESSAGE:
            raise self._end(f"the bridge sent a message of {size:#x} bytes")
        if len(self._received) < size:
            return None
        body = bytes(self._received[HEADER_CODEC.size : size])
        del self._received[:size]
        return kind, status, number, body

    def _sort_in(self, kind: int, status: int, number: int, body: bytes) -> None:
        if kind == RtlMessage.END:
            raise self._end(body.decode(errors="replace"))
        if kind == RtlMessage.RESET:
            self.requests.append(BridgeRequest(RtlMessage.RESET, number))
        elif kind in (RtlMessage.READ, RtlMessage.WRITE) and len(body) >= ACCESS_CODEC.size:
            bar, count, offset = ACCESS_CODEC.unpack_from(body)
            self.requests.append(BridgeRequest(RtlMessage(kind), number, bar, offset, count, body[ACCESS_CODEC.size :]))
        elif kind & REPLY and number in self._transfers:
            transfer = self._transfers.pop(number)
            transfer.status, transfer.data = status, body
        else:
            raise self._end(f"the bridge sent a message of kind {kind:#x}, id {number:#x}")

    def _end(self, why: str) -> BridgeEnded:
        """For all that is called from now on, too."""
        self._ended = self._ended or why
        return BridgeEnded(self._ended)


@contextmanager
def connect_to_bridge(path: str | Path, timeout: float = 60.0) -> Iterator[BridgeClient]:
    """A connection to the bridge that listens at ``path``, ended with the block; retried for ``timeout`` seconds.

    Raises OSError where there is none by then, BridgeEnded where it speaks another version, or serves another simulator
    for ``timeout`` seconds more.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        end = time.monotonic() + timeout
        while True:
            try:
                sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > end:
                    why = f"{error.strerror}: no bridge has listened there for {timeout:g} s"
                    raise type(error)(error.errno, why, str(path)) from None
                time.sleep(_RETRY_S)
        client = BridgeClient(sock, timeout)
        yield client
        client.end("the simulation is over")
