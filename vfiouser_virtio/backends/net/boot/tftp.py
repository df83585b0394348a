"""TFTP server (RFC 1350, 2347 to 2349, 7440): gives out files, each transfer a task with an end of its own.

::

    client port ──RRQ──▶ 69            OACK, or DATA 1, comes from the transfer's own port
                ◀─DATA── 49152 + n     up to windowsize blocks, then it waits for ACK, and sends again after a while
                ──ACK──▶
"""

import errno
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from vfiouser_virtio.backends.net.boot.folder import Folder, ServedFile
from vfiouser_virtio.backends.net.boot.host import BadPacket, Datagram, Station
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.device_log import DeviceLog, quoted
from vfiouser_virtio.protocols import tftp
from vfiouser_virtio.protocols.tftp import HEADER_CODEC, OPCODE_CODEC, ErrorCode, Opcode, TftpRequest

T = TypeVar("T")

MAX_TRANSFERS = 16
"""At a time; a guest that asks for more is told so: each has a file open, and `READ_AHEAD` bytes of it in memory."""
MAX_ENDING = 8 * MAX_TRANSFERS
"""With those that are cancelled, which end only when their tasks run: a guest that asks for one file after the other in
one burst, from one port, must not fill memory with them, nor use up the ports."""
SILENCE = 10.0
"""Seconds without a word of its client after which a transfer makes room for a new one, where there is none: clients
that ask, with the longest timeout, and say no more would hold all of them for half an hour."""
MAX_REQUEST = 512
"""Bytes of a request (RFC 2347)."""
MAX_BLKSIZE = 1468
"""What fits into a packet of 1500 bytes: nothing is sent in fragments."""
MAX_WINDOWSIZE = 16
MAX_TIMEOUT = 255
"""Seconds (RFC 2349)."""
TIMEOUT = 1.0
"""Seconds without an acknowledgement after which a window is sent again, where the client has not said another."""
TRIES = 8
"""How often the same is sent before a client is taken for gone."""
READ_AHEAD = 256 << 10
"""Bytes that are read from a file at once: a thread's call takes longer than sending a block."""
# Threads that read; on a file system that hangs they are all that is lost, however often a guest asks.
READERS = 4
_FIRST_PORT, _PORTS = 49152, 16384

Send = Callable[[Station, int, int, bytes], Awaitable[None]]
"""Sends a datagram when there is room for it: to whom, from which port, to which port, the payload."""
SendNowait = Callable[[Station, int, int, bytes], None]
"""As `Send`, where there is room now; else it is dropped."""


class TftpServer:
    """TFTP server of a folder's files; `receive` gets the datagrams, `run` sends. ``folder`` None: there are none."""

    def __init__(self, folder: Folder | None, send: Send, send_nowait: SendNowait, log: DeviceLog) -> None:
        self._folder = folder
        self._send = send
        self._send_nowait = send_nowait
        self._log = log
        self._readers = trio.CapacityLimiter(READERS)
        self._transfers: dict[tuple[Station, int], Transfer] = {}
        self._by_port: dict[int, Transfer] = {}
        self._ports = itertools.cycle(range(_FIRST_PORT, _FIRST_PORT + _PORTS))
        self._nursery: trio.Nursery | None = None

    @property
    def transfers(self) -> int:
        """How many are in progress."""
        return len(self._transfers)

    @property
    def ending(self) -> int:
        """How many have a task: those in progress, and those that are cancelled and have not ended yet."""
        return len(self._by_port)

    async def run(self) -> None:
        """Let there be transfers, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:  # before it is closed to new tasks, which is before all of its tasks have ended
                self._nursery = None

    # ---- what comes ----------------------------------------------------------------------------------------------

    def receive(self, datagram: Datagram) -> bool:
        """Take a datagram, to port 69 or a transfer's; False where it belongs to none. Raises BadPacket."""
        if datagram.port != tftp.PORT:
            transfer = self._by_port.get(datagram.port)
            if transfer is None or (datagram.sender, datagram.source) != transfer.client:
                return False
            transfer.receive(datagram.payload)
            return True
        if self._folder is None or self._nursery is None:
            return False
        payload = datagram.payload
        if not OPCODE_CODEC.size <= len(payload) <= MAX_REQUEST:
            raise BadPacket("tftp", f"TFTP: a request of {len(payload):#x} bytes")
        (opcode,) = OPCODE_CODEC.unpack_from(payload)
        if opcode not in (Opcode.RRQ, Opcode.WRQ):
            raise BadPacket("tftp", f"TFTP: opcode {opcode:#x} at port 69, expected a request")
        try:
            request = tftp.parse_request(bytes(payload[OPCODE_CODEC.size :]))
        except ValueError as error:
            raise BadPacket("tftp", f"TFTP: {error}") from None
        client = (datagram.sender, datagram.source)
        before = self._transfers.get(client)
        if before is not None and before.request == request and not (before.acknowledged or before.cancelled):
            return True  # it has asked again before the answer was there
        if self.ending >= MAX_ENDING:
            text = f"TFTP: {MAX_ENDING} requests at once, each in the place of another"
            raise BadPacket("ending", text, Drop.QUEUE_FULL)
        if before is not None:
            before.cancel()
        elif self.transfers >= MAX_TRANSFERS and not self._make_room():
            text = f"{MAX_TRANSFERS} files are on their way already"
            refusal = tftp.build_error(ErrorCode.NOT_DEFINED, text)
            self._send_nowait(datagram.sender, tftp.PORT, datagram.source, refusal)
            raise BadPacket("transfers", f"TFTP: {text}", Drop.QUEUE_FULL)
        self._start(self._folder, client, opcode, request)
        return True

    def _make_room(self) -> bool:
        """End the transfer whose client has been silent for longest, if that is `SILENCE` or more."""
        silent = min(self._transfers.values(), key=lambda each: each.heard)
        if trio.current_time() - silent.heard < SILENCE:
            return False
        silent.cancel()
        del self._transfers[silent.client]
        return True

    def _start(self, folder: Folder, client: tuple[Station, int], opcode: int, request: TftpRequest) -> None:
        assert self._nursery is not None
        port = next(each for each in self._ports if each not in self._by_port)

        async def send(payload: bytes) -> None:
            await self._send(client[0], port, client[1], payload)

        transfer = Transfer(client, request, send, self._in_thread)
        self._transfers[client] = self._by_port[port] = transfer

        async def work() -> None:
            try:
                with transfer.scope:
                    await self._transfer(folder, transfer, opcode)
            finally:
                del self._by_port[port]
                if self._transfers.get(client) is transfer:
                    del self._transfers[client]

        self._nursery.start_soon(work)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """What the call returns or raises; left behind when it is cancelled."""
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._readers)

    async def _transfer(self, folder: Folder, transfer: "Transfer", opcode: int) -> None:
        request = transfer.request
        name = request.filename
        if opcode == Opcode.WRQ:
            await transfer.refuse(ErrorCode.ACCESS_VIOLATION, "files are given out, none are taken")
            return
        if request.mode != "octet":
            await transfer.refuse(ErrorCode.ILLEGAL_OPERATION, "mode is not octet (in tftp(1): binary)")
            return
        shown = quoted(name.decode(errors="replace"))
        try:
            file = await self._in_thread(lambda: folder.open(name))
            self._log.once(("file", name), "TFTP: %s, %d bytes", shown, file.size, level=logging.INFO)
            await transfer.run(file)
        except OSError as error:
            said = "TFTP: %s of %s: %s"
            self._log.once(("file", name), said, shown, folder.path, error.strerror, level=logging.INFO)
            code = ErrorCode.ACCESS_VIOLATION if isinstance(error, PermissionError) else ErrorCode.NOT_DEFINED
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                code = ErrorCode.FILE_NOT_FOUND
            await transfer.refuse(code, error.strerror or "it cannot be read")


class Transfer:
    """Transfer of one file to one client."""

    def __init__(
        self,
        client: tuple[Station, int],
        request: TftpRequest,
        send: Callable[[bytes], Awaitable[None]],
        in_thread: Callable[[Callable[[], bytes]], Awaitable[bytes]],
    ) -> None:
        self.client = client
        """Where it is, and its port."""
        self.request = request
        self.scope = trio.CancelScope()
        self.heard = trio.current_time()
        """When the client has last said something new, by trio's clock."""
        self._send = send
        self._in_thread = in_thread
        self._blksize, self._windowsize, self._timeout = tftp.DEFAULT_BLKSIZE, 1, TIMEOUT
        # Block 0 is the OACK. Numbers go on beyond 65535 here, and not on the wire.
        self._first = self._acknowledged = self._sent = 0
        self._progress = trio.Event()
        self._begin, self._piece = 0, b""  # of the file: where in it, and the bytes

    @property
    def acknowledged(self) -> bool:
        """Whether the client has taken something of it."""
        return self._acknowledged > self._first

    @property
    def cancelled(self) -> bool:
        """Whether it is at its end, or will be when its task runs."""
        return self.scope.cancel_called

    def cancel(self) -> None:
        """End it without another word."""
        self.scope.cancel()

    def receive(self, payload: memoryview) -> None:
        """Take a packet of the client. What acknowledges nothing new is answered by nothing: each repetition would be
        answered by another one else (the Sorcerer's Apprentice Syndrome, RFC 1123, 4.2.3.1). Raises BadPacket."""
        if len(payload) < HEADER_CODEC.size:
            raise BadPacket("tftp", f"TFTP: a packet of {len(payload):#x} bytes")
        opcode, number = HEADER_CODEC.unpack_from(payload)
        if opcode == Opcode.ERROR:  # also the end of a client that only wanted to know the size
            self.cancel()
        elif opcode == Opcode.ACK:
            step = (number - self._acknowledged) & 0xFFFF
            if 0 < step <= self._sent - self._acknowledged:
                self._acknowledged += step
                self.heard = trio.current_time()
                self._progress.set()
        else:
            raise BadPacket("tftp", f"TFTP: opcode {opcode:#x} in a transfer to a client")

    async def refuse(self, code: ErrorCode, text: str) -> None:
        """Tell the client that there is no file, or no more of it."""
        await self._send(tftp.build_error(code, text))

    async def run(self, file: ServedFile) -> None:
        """Send all of the file. Raises OSError where it cannot be read, or has become shorter."""
        accepted = self._negotiate(file.size)
        self._first = self._acknowledged = self._sent = -1 if accepted else 0
        last = file.size // self._blksize + 1  # the block that is not full
        tries = 0
        while self._acknowledged < last:
            before = self._acknowledged
            self._progress = trio.Event()
            if before < 0:
                self._sent = 0
                await self._send(tftp.build_oack(accepted))
            else:
                for number in range(before + 1, min(before + self._windowsize, last) + 1):
                    data = await self._block(file, number)
                    self._sent = max(self._sent, number)
                    await self._send(tftp.build_data(number, data))
            with trio.move_on_after(self._timeout):
                await self._progress.wait()
            tries = tries + 1 if self._acknowledged == before else 0
            if tries == TRIES:
                return

    def _negotiate(self, size: int) -> dict[str, int]:
        """The client's options that are taken, and what they are; others are as if they had not been there."""
        accepted: dict[str, int] = {}
        for name, text in self.request.options.items():
            value = int(text) if text.isdecimal() and len(text) < 10 else -1
            if name == "blksize" and value >= tftp.MIN_BLKSIZE:
                accepted[name] = self._blksize = min(value, MAX_BLKSIZE)
            elif name == "windowsize" and value >= 1:
                accepted[name] = self._windowsize = min(value, MAX_WINDOWSIZE)
            elif name == "timeout" and 1 <= value <= MAX_TIMEOUT:
                accepted[name] = value
                self._timeout = float(value)
            elif name == "tsize" and value >= 0:
                accepted[name] = size
        return accepted

    async def _block(self, file: ServedFile, number: int) -> bytes:
        start = (number - 1) * self._blksize
        count = min(self._blksize, file.size - start)
        at = start - self._begin
        if not 0 <= at <= at + count <= len(self._piece):
            self._begin, at = start, 0
            self._piece = await self._in_thread(lambda: file.read(start, READ_AHEAD))
            if len(self._piece) < count:
                raise OSError(errno.EIO, "the file has become shorter")
        return self._piece[at : at + count]
