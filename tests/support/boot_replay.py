"""Client that says to a server what QEMU said while Linux booted, with a driver's requests in the rings.

The messages are those of the record. What the guest had in its memory is not: when a queue is enabled its ring is laid
out where the guest had it, and before each notification requests are put into it (`testing.raw`).
"""

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from fcntl import fcntl

import trio
from support.boot_devices import Request
from support.boot_record import BootRecord, RecordedMessage, make_fds

from vfiouser_virtio.fds import F_ADD_SEALS, F_SEAL_SHRINK, close_all
from vfiouser_virtio.protocols.vfio_user import DMA_ACCESS, DMA_MAP, DMA_UNMAP, Command, MessageFlags
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.raw.client import RawClient, RawMessage, raw_message
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import WRITE, RawRing, RingFullError
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.transports.pci import COMMON, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR

REGISTERS = {at: (name, size) for name, (at, size) in COMMON_CFG_OFFSETS.items()}
HEAP, HEAP_END = 0x100_0000, 0x300_0000
"""Guest addresses of the requests' buffers; Linux has its rings elsewhere."""

Requests = Callable[[int], list[Request]]


class GuestRam:
    """The guest's RAM: the first memfd of a record, by guest address as far as it is mapped."""

    def __init__(self, record: BootRecord) -> None:
        self.fds = []
        for size in record.memfds:
            self.fds.append(os.memfd_create("boot-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(self.fds[-1], size)
            fcntl(self.fds[-1], F_ADD_SEALS, F_SEAL_SHRINK)
        self._bytes = [mmap.mmap(fd, size) for fd, size in zip(self.fds, record.memfds, strict=True)]
        self.mapped: dict[int, tuple[int, int, int]] = {}
        """By guest address: size, memfd, offset."""

    def read(self, address: int, count: int) -> bytes:
        memory, at = self._find(address, count)
        return memory[at : at + count]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self._find(address, len(data))
        memory[at : at + len(data)] = data

    def _find(self, address: int, count: int) -> tuple[mmap.mmap, int]:
        for start, (size, number, offset) in self.mapped.items():
            if start <= address and address + count <= start + size:
                return self._bytes[number], address - start + offset
        raise LookupError(f"the guest has no RAM at {address:#x}+{count:#x}")

    def close(self) -> None:
        for memory in self._bytes:
            memory.close()
        close_all(self.fds)


class Rings:
    """Rings of the guest's driver, as its register writes tell of them."""

    def __init__(self, ram: GuestRam, requests: Requests, sizes: Sequence[int]) -> None:
        """``sizes`` of the queues are those that a driver finds, and may leave as they are: SeaBIOS does."""
        self._ram, self._requests, self._sizes = ram, requests, sizes
        self.rings: dict[int, RawRing] = {}
        self._heap = HEAP
        self._forget()

    def _forget(self) -> None:
        self.rings.clear()
        self._values: dict[str, int] = {}
        self._features = 0
        self._queues: dict[int, dict[str, int]] = {}

    def written(self, offset: int, data: bytes) -> None:
        """The driver is about to write to BAR 4."""
        value = int.from_bytes(data, "little")
        if offset >= NOTIFY:
            self._fill((offset - NOTIFY) // NOTIFY_MULTIPLIER)
            return
        high = offset - 4 in REGISTERS and REGISTERS[offset - 4][1] == 8  # 8 bytes are written as two times 4
        name, _ = REGISTERS.get(offset - COMMON - 4 * high, ("", 0))
        if name == "device_status" and value == 0:
            self._forget()
        elif name == "driver_feature":
            self._features |= value << 32 * self._values.get("driver_feature_select", 0)
        elif name == "queue_enable" and value == 1:
            self._enable()
        elif name.startswith("queue_") and name != "queue_select":
            queue = self._queues.setdefault(self._values.get("queue_select", 0), {})
            queue[name] = queue.get(name, 0) | value << 32 if high else value
        else:
            self._values[name] = value

    def _enable(self) -> None:
        index = self._values.get("queue_select", 0)
        queue = self._queues[index]
        make = RawPackedRing if self._features & Feature.RING_PACKED.mask else RawSplitRing
        addresses = queue["queue_desc"], queue["queue_driver"], queue["queue_device"]
        assert not any(HEAP <= address < HEAP_END for address in addresses), "Linux has a ring where the buffers go"
        self.rings[index] = make(self._ram, queue.get("queue_size", self._sizes[index]), addresses, index)

    def _fill(self, queue: int) -> None:
        if queue not in self.rings:
            return
        ring = self.rings[queue]
        while ring.take_used() is not None:
            pass
        for readable, writable in self._requests(queue):
            segments = []
            for data in readable:
                segments.append((self._allocate(len(data)), len(data), 0))
                self._ram.write(segments[-1][0], data)
            segments += [(self._allocate(size), size, WRITE) for size in writable]
            try:
                ring.add(segments)
            except RingFullError:
                return

    def _allocate(self, size: int) -> int:
        address, self._heap = self._heap, self._heap + -(-size // 64) * 64
        return address


class Replay:
    """Client on one connection. `run` reads what the server says, as long as the connection lasts."""

    def __init__(
        self, sock: socket.socket, record: BootRecord, requests: Requests, sizes: Sequence[int], *, private: bool
    ) -> None:
        """``sizes`` are those of the device's queues.

        With ``private`` the record's memory comes without its descriptors, and the server has to ask for it.
        """
        self.client = RawClient(sock)
        self.ram = GuestRam(record)
        self.rings = Rings(self.ram, requests, sizes)
        self.refused: list[str] = []
        """Requests that the server has answered with an error."""
        self._record, self._private = record, private
        self._owed = 0
        self._silent = False
        self._answered = trio.lowlevel.ParkingLot()

    # ---- what the client says --------------------------------------------------------------------------------------

    async def send(self, first: int, last: int) -> None:
        """Messages ``first`` to ``last - 1``, without a pause, as far as answers are concerned."""
        for message in self._record.messages[first:last]:
            await self._send(message, None)

    async def send_part(self, index: int, size: int) -> None:
        """The first ``size`` bytes of a message, after which nothing comes: no answer either."""
        self._silent = True
        await self._send(self._record.messages[index], size)

    def length(self, index: int) -> int:
        """Bytes of a message, header and all."""
        return len(self._encoded(self._record.messages[index])[0])

    async def settle(self) -> None:
        """Every request was answered."""
        with trio.fail_after(60):
            while self._owed:
                await self._answered.park()

    async def _send(self, message: RecordedMessage, size: int | None) -> None:
        data, kinds = self._encoded(message)
        if size is None:
            self._guest_does(message)
            self._owed += not message.flags & MessageFlags.NO_REPLY
        fds = make_fds(kinds, lambda number: self.ram.fds[number])
        try:
            await self.client.send(data[:size], fds)
        finally:
            close_all(fds)

    def _encoded(self, message: RecordedMessage) -> tuple[bytes, tuple[str, ...]]:
        body, fds = message.body, message.fds
        if self._private and message.command == Command.DMA_MAP:
            fields = DMA_MAP.parse(body)
            body, fds = DMA_MAP.build({**fields, "offset": 0}), ()
        return raw_message(message.command, body, message_id=message.id, flags=message.flags), fds

    def _guest_does(self, message: RecordedMessage) -> None:
        if message.command == Command.DMA_MAP:
            fields = DMA_MAP.parse(message.body)
            for kind in message.fds:
                self.ram.mapped[fields.address] = fields.size, int(kind.removeprefix("memfd")), fields.offset
        elif message.command == Command.DMA_UNMAP:
            fields = DMA_UNMAP.parse(message.body)
            for address in [each for each in self.ram.mapped if fields.address <= each < fields.address + fields.size]:
                del self.ram.mapped[address]
        elif message.command == Command.REGION_WRITE:
            offset, region = int.from_bytes(message.body[:8], "little"), int.from_bytes(message.body[8:12], "little")
            if region == VIRTIO_BAR:
                self.rings.written(offset, message.body[16:])
        elif message.command == Command.DEVICE_RESET:
            self.rings.written(COMMON_CFG_OFFSETS["device_status"][0], b"\0")

    # ---- what the server says --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the connection ends, on either side."""
        while True:
            try:
                message = await self.client.receive()
            except (EOFError, OSError, trio.ClosedResourceError):
                return
            close_all(message.fds)
            if message.flags & MessageFlags.REPLY:
                self._owed -= 1
                if message.error:
                    self.refused.append(f"{Command(message.command).name}: {os.strerror(message.error)}")
                self._answered.unpark_all()
            elif not self._silent:
                await self._dma(message)

    async def _dma(self, message: RawMessage) -> None:
        access, data = message.body[: DMA_ACCESS.sizeof()], message.body[DMA_ACCESS.sizeof() :]
        address, count = int.from_bytes(access[:8], "little"), int.from_bytes(access[8:16], "little")
        if message.command == Command.DMA_WRITE:
            self.ram.write(address, data)
            data = b""
        else:
            data = self.ram.read(address, count)
        reply = raw_message(message.command, access + data, message_id=message.id, flags=MessageFlags.REPLY)
        try:
            await self.client.send(reply)
        except (OSError, trio.ClosedResourceError):
            pass

    def close(self) -> None:
        """The client is gone, and its memory with it."""
        if self.client.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.client.socket)
            self.client.close()
            self.ram.close()
