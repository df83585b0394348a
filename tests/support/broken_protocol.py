"""Broken vfio-user servers (see `support.broken`).

A long file: one class a fault, each of a few lines, and the table that names them.
"""

import dataclasses
import errno
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import trio
from support.broken import breaks

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, REGION_ACCESS_CODEC, Command, MessageFlags
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_device import (
    Buffer,
    DeviceInfo,
    Hold,
    IoEventFd,
    IrqInfo,
    IrqInfoFlags,
    IrqSetFlags,
    PciRegion,
    RegionInfo,
)
from vfiouser_virtio.vfio_user.server.dispatch import Response
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.vfio_user.wire.connection import HEADER_SIZE, Connection, Message, reply
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket


class ChangesPayload(Session):
    """The payload of its replies to one command is another."""

    of: ClassVar[Command]

    def change(self, payload: bytes) -> bytes:
        raise NotImplementedError

    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        message_id, command, _size, flags, _error = HEADER_CODEC.unpack_from(data)
        if command == self.of and flags == MessageFlags.REPLY:
            data = reply(message_id, command, self.change(data[HEADER_SIZE:]))
        super()._send(data, fds, channel)


class ChangesRequest(Session):
    """It takes requests of one command, or of all, for others."""

    of: ClassVar[Command | None] = None

    def change(self, body: bytes) -> bytes:
        raise NotImplementedError

    def _handle(self, message: Message) -> Response | None:
        if self.of in (None, message.command):
            message.body = self.change(bytes(message.body))
        return super()._handle(message)


class TakesAny(Session):
    """It says yes to some requests, whatever is in them."""

    def takes(self, message: Message) -> bool:
        raise NotImplementedError

    def _handle(self, message: Message) -> Response | None:
        if self.client is None or not self.takes(message):
            return super()._handle(message)
        for fd in message.take_fds():
            os.close(fd)
        self._answer(message, Response(bytes(4)))
        return None


# ---- VERSION -----------------------------------------------------------------------------------------------------


@breaks("vfio-user/version-first")
class AnswersBeforeVersion(Session):
    def _negotiate(self, message: Message) -> None:
        if message.command == Command.VERSION:
            super()._negotiate(message)
        else:
            self._send(reply(message.id, message.command, bytes(16)))


@breaks("vfio-user/version-major")
class TakesAnyMajor(ChangesRequest):
    of = Command.VERSION

    def change(self, body: bytes) -> bytes:
        return b"\0\0" + body[2:]


class ChangesVersion(ChangesPayload):
    of = Command.VERSION


@breaks("vfio-user/version-minor")
class AnswersMinor1(ChangesVersion):
    def change(self, payload: bytes) -> bytes:
        return b"\0\0\1\0" + payload[4:]


@breaks("vfio-user/version-json")
class ForgetsTheNul(ChangesVersion):
    def change(self, payload: bytes) -> bytes:
        return payload[:4] + payload[4:].rstrip(b"\0")


@breaks("vfio-user/version-no-json", logs="no JSON; connection closed")
class WantsJson(Session):
    def _negotiate(self, message: Message) -> None:
        if len(message.body) == 4:
            raise PeerError("no JSON", fatal=True)
        super()._negotiate(message)


@breaks("vfio-user/version-subset")
class HasATwinForEverybody(ChangesVersion):
    def change(self, payload: bytes) -> bytes:
        return payload[:4] + b'{"capabilities": {"twin_socket": {"supported": true, "fd_index": 0}}}\0'


@breaks("qemu/version-size")
class AnswersAtLength(ChangesVersion):
    def change(self, payload: bytes) -> bytes:
        return payload[:4] + b'{"capabilities": {"x": "' + b"x" * 200 + b'"}}\0'


@breaks("qemu/version-limits")
class TakesMoreFdsThanQemu(ChangesVersion):
    def change(self, payload: bytes) -> bytes:
        return payload[:4] + b'{"capabilities": {"max_msg_fds": 17}}\0'


@breaks("vfio-user/version-bad-json")
class ReadsOverBadJson(Session):
    def _negotiate(self, message: Message) -> None:
        try:
            super()._negotiate(message)
        except PeerError:
            super()._negotiate(dataclasses.replace(message, body=message.body[:4]))


@breaks("vfio-user/version-twice")
class NegotiatesAgain(TakesAny):
    def takes(self, message: Message) -> bool:
        return message.command == Command.VERSION


# ---- messages ----------------------------------------------------------------------------------------------------


@breaks("vfio-user/message-id")
class HasIdsOfItsOwn(Session):
    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        if data[2] == Command.DEVICE_GET_INFO:
            data = bytes([data[0] ^ 1]) + data[1:]
        super()._send(data, fds, channel)


@breaks("vfio-user/no-reply", logs="access of 1 bytes at 0x10000000000 is outside region 7")
class AnswersPostedWrites(Session):
    def _refuse(self, message_id: int, command: int, flags: int, error: Exception) -> None:
        super()._refuse(message_id, command, 0, error)


@breaks("vfio-user/order")
class AnswersOneRequestLate(Session):
    late = b""

    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        if data[2] == Command.DEVICE_GET_INFO:
            self.late = data
            return
        super()._send(data, fds, channel)
        if self.late:
            super()._send(self.late)
            self.late = b""


@breaks("vfio-user/unknown-command")
class KnowsEveryCommand(TakesAny):
    def takes(self, message: Message) -> bool:
        return message.command > 18


@breaks("vfio-user/error-reply", logs="command 0xc8: unknown|is outside region 7")
class ExplainsErrors(Session):
    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        message_id, command, size, flags, error = HEADER_CODEC.unpack_from(data)
        if flags & MessageFlags.ERROR:
            data = HEADER_CODEC.pack(message_id, command, size + 4, flags, error) + b"why?"
        super()._send(data, fds, channel)


class ReceivesOtherwise(Session):
    """It has another way to find messages in what has come."""

    connection: ClassVar[type[Connection]]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._main.connection = self.connection()


class LengthensSmallSizes(Connection):
    def next(self) -> bool:
        if self.end - self.position >= HEADER_SIZE:
            message_id, command, size, *rest = HEADER_CODEC.unpack_from(self.buffer, self.position)
            HEADER_CODEC.pack_into(self.buffer, self.position, message_id, command, max(size, HEADER_SIZE), *rest)
        return super().next()


@breaks("vfio-user/size-below-header")
class DoesNotMindSmallSizes(ReceivesOtherwise):
    connection = LengthensSmallSizes


class WaitsForMore(Connection):
    def next(self) -> bool:
        try:
            return super().next()
        except PeerError:
            return False

    def _allocate(self, capacity: int) -> None:
        super()._allocate(min(capacity, 1 << 20))


@breaks("vfio-user/size-above-limit", logs="the client went in the middle of a message")
class WaitsForAnySize(ReceivesOtherwise):
    connection = WaitsForMore


@breaks("vfio-user/short-payload", logs="0x0 is not a range|needs exactly one DATA and one ACTION|bytes are allowed")
class FillsShortPayloadsUp(ChangesRequest):
    def change(self, body: bytes) -> bytes:
        return body.ljust(32, b"\0")


@breaks("vfio-user/pieces")
class ForgetsHalfAMessage(Session):
    def _process(self) -> bool:
        more = super()._process()
        if not more:
            self._main.connection.position = self._main.connection.end
        return more


@breaks("vfio-user/unexpected-fds")
class KeepsFds(Session):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.kept: list[int] = []

    def _handle(self, message: Message) -> Response | None:
        self.kept += map(os.dup, message.fds)
        return super()._handle(message)

    def _close(self) -> None:
        super()._close()
        for fd in self.kept:
            os.close(fd)


@breaks("vfio-user/disconnect", logs="the client went in the middle of a message")
class MournsAClient(Session):
    mourns = False

    def _close(self) -> None:
        self.mourns = self._main.connection.end > self._main.connection.position
        super()._close()

    async def run(self) -> None:
        await super().run()
        if self.mourns:
            await trio.sleep_forever()


@breaks("vfio-user/reply-type")
class IsStunnedByAReply(Session):
    def _receive_reply(self, message: Message) -> None:
        self._held, self._fast = True, False


# ---- commands ----------------------------------------------------------------------------------------------------


@breaks("vfio-user/device-info", logs="argsz 0x4 is below 0x10")
class HasFiveRegions(VirtioPci):
    def device_info(self) -> DeviceInfo:
        return super().device_info()._replace(num_regions=5)


@breaks("vfio-user/argsz", logs="too long")
class WantsTheExactPayload(Session):
    def _handle(self, message: Message) -> Response | None:
        if message.command == Command.DEVICE_GET_INFO and len(message.body) != 16:
            self._refuse(message.id, message.command, message.flags, PeerError("too long"))
            return None
        return super()._handle(message)


@breaks("vfio-user/region-info", logs="argsz 0x8 is below 0x20")
class HasAThousandRegions(VirtioPci):
    def region_info(self, index: int) -> RegionInfo:
        return super().region_info(index) if index < 9 else RegionInfo()


@breaks("vfio-user/irq-info")
class HasAThousandIrqs(VirtioPci):
    def irq_info(self, index: int) -> IrqInfo:
        return super().irq_info(index) if index < 5 else IrqInfo(IrqInfoFlags.EVENTFD, 0)


@breaks("qemu/reply-size")
class AnswersWithTooMuch(ChangesPayload):
    of = Command.DEVICE_GET_REGION_INFO

    def change(self, payload: bytes) -> bytes:
        return payload + bytes(16)


@breaks(
    "vfio-user/access-bounds", logs="is outside region 7|which is absent|bytes are allowed|more complaints like these"
)
class HasNoBounds(VirtioPci):
    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        beyond = index == PciRegion.CONFIG and offset + count > self.config.size
        return bytes(count) if beyond else super().region_read(index, offset, count)


@breaks("vfio-user/access-reply")
class ConfirmsWritesBriefly(Session):
    class Socket(MessageSocket):
        def send(self, message: bytes, fds: Sequence[int] = ()) -> bool:
            if message[2] == Command.REGION_WRITE:
                message = reply(int.from_bytes(message[:2], "little"), Command.REGION_WRITE)
            return super().send(message, fds)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._main = self.Socket(self._main.socket)


@breaks("vfio-user/write-data")
class MakesDataUp(ChangesRequest):
    of = Command.REGION_WRITE

    def change(self, body: bytes) -> bytes:
        return body.ljust(REGION_ACCESS_CODEC.size + REGION_ACCESS_CODEC.unpack_from(body)[2], b"\0")


@breaks("vfio-user/dma-map-argsz", logs="is not a range|more complaints like these")
class IgnoresArgsz(ChangesRequest):
    of = Command.DMA_MAP

    def change(self, body: bytes) -> bytes:
        return b"\xff\xff\0\0" + body[4:]


@breaks("vfio-user/dma-map-overlap", "vfio-user/dma-map-short-file")
class MapsAnything(VirtioPci):
    def dma_map(self, address: int, size: int, **named: Any) -> None:
        try:
            super().dma_map(address, size, **named)
        except PeerError:
            pass


@breaks("vfio-user/dma-unmap-reply")
class UnmapsWithoutAWord(ChangesPayload):
    of = Command.DMA_UNMAP

    def change(self, payload: bytes) -> bytes:
        return b""


@breaks("qemu/dma-unmap-nothing", logs="no such mapping")
class UnmapsOnlyWhatIsThere(VirtioPci):
    def dma_unmap(self, address: int, size: int) -> Hold | None:
        if not any(region.address == address for region in self.memory.regions):
            raise PeerError("no such mapping", errno.ENOENT)
        return super().dma_unmap(address, size)


@breaks("vfio-user/dma-messages", logs="memory without a file descriptor")
class NeedsFds(VirtioPci):
    def dma_map(self, address: int, size: int, *, fd: int | None, **named: Any) -> None:
        if fd is None:
            raise PeerError("memory without a file descriptor")
        super().dma_map(address, size, fd=fd, **named)


@breaks("vfio-user/set-irqs-refused")
class TakesAnySetIrqs(TakesAny):
    def takes(self, message: Message) -> bool:
        return message.command == Command.DEVICE_SET_IRQS


@breaks("vfio-user/irq-trigger")
class TriggersTheWrongVector(VirtioPci):
    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        if flags & IrqSetFlags.ACTION_TRIGGER and flags & IrqSetFlags.DATA_NONE and count == 1:
            start = (start + 1) % self.irq_info(index).count
        super().set_irqs(index, flags, start, count, data, fds)


@breaks("qemu/reset-keeps-memory", logs="broke virtio.* no memory is mapped at 0x")
class ForgetsMemoryAtReset(VirtioPci):
    def reset(self) -> Hold | None:
        self.memory.unmap(0, 1 << 64)
        return super().reset()


@breaks("vfio-user/twin-socket", logs="RAM .* no file descriptor")
class ForgetsItsTwin(Session):
    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        super()._send(data, fds)


class SendsNothingByItsTwin(Session):
    """It agrees on a twin socket, and has no DMA messages, as SPDK's target."""

    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        if channel is None:
            super()._send(data, fds)


@breaks("vfio-user/io-fds", logs="GET_REGION_IO_FDS index 0x3e8: there are 9", poll="off")
class NeverLooksAtIoeventfds(VirtioPci):
    async def serve(self) -> None:
        self.unheard = os.eventfd(0)
        try:
            await super().serve()
        finally:
            os.close(self.unheard)

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        return [each._replace(fd=self.unheard) for each in super().io_fds(index)]


@breaks("vfio-user/write-multi")
class WritesOnce(ChangesRequest):
    of = Command.REGION_WRITE_MULTI
    count = b""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named | {"write_multiple": True})

    def change(self, body: bytes) -> bytes:
        self.count = body[:8]
        return (1).to_bytes(8, "little") + body[8:]

    def _answer(self, message: Message, answer: Response) -> None:
        super()._answer(message, answer._replace(payload=self.count) if message.command == self.of else answer)
