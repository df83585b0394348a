"""Broken vfio-user servers (see `support.broken`)."""

import dataclasses
import errno
from typing import Any

import pytest
import trio
from support.broken import around, breaks
from support.faithful import write_multiple

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.msix import Msix
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, REGION_ACCESS_CODEC, Command
from vfiouser_virtio.vfio_device import DeviceInfo, IrqInfo, IrqInfoFlags, RegionInfo
from vfiouser_virtio.vfio_user import Server
from vfiouser_virtio.vfio_user.server import dispatch, session
from vfiouser_virtio.vfio_user.server.dispatch import Response
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.vfio_user.wire import connection
from vfiouser_virtio.vfio_user.wire.connection import Connection, reply
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

# ---- VERSION -----------------------------------------------------------------------------------------------------


@breaks("vfio-user/version-first")
def answers_before_version(patch: pytest.MonkeyPatch) -> None:
    def negotiate(original: Any, self: Session, message: Any) -> None:
        if message.command == Command.VERSION:
            original(self, message)
        else:
            self._send(reply(message.id, message.command, bytes(16)))

    around(patch, Session, "_negotiate", negotiate)


@breaks("vfio-user/version-major")
def takes_any_major(patch: pytest.MonkeyPatch) -> None:
    around(patch, session, "negotiate", lambda original, body, **named: original(b"\0\0" + bytes(body[2:]), **named))


def _answer_version(patch: pytest.MonkeyPatch, change: Any) -> None:
    def negotiate(original: Any, body: Any, **named: Any) -> Any:
        agreed, payload = original(body, **named)
        return agreed, change(payload)

    around(patch, session, "negotiate", negotiate)


@breaks("vfio-user/version-minor")
def answers_minor_1(patch: pytest.MonkeyPatch) -> None:
    _answer_version(patch, lambda payload: b"\0\0\1\0" + payload[4:])


@breaks("vfio-user/version-json")
def forgets_the_nul(patch: pytest.MonkeyPatch) -> None:
    _answer_version(patch, lambda payload: payload[:4] + payload[4:].rstrip(b"\0"))


@breaks("vfio-user/version-no-json", logs="no JSON; connection closed")
def wants_json(patch: pytest.MonkeyPatch) -> None:
    def negotiate(original: Any, body: Any, **named: Any) -> Any:
        if len(body) == 4:
            raise PeerError("no JSON", fatal=True)
        return original(body, **named)

    around(patch, session, "negotiate", negotiate)


@breaks("vfio-user/version-subset")
def has_a_twin_for_everybody(patch: pytest.MonkeyPatch) -> None:
    twin = b'{"capabilities": {"twin_socket": {"supported": true, "fd_index": 0}}}\0'
    _answer_version(patch, lambda payload: payload[:4] + twin)


@breaks("qemu/version-size")
def answers_at_length(patch: pytest.MonkeyPatch) -> None:
    _answer_version(patch, lambda payload: payload[:4] + b'{"capabilities": {"x": "' + b"x" * 200 + b'"}}\0')


@breaks("qemu/version-limits")
def takes_more_fds_than_qemu(patch: pytest.MonkeyPatch) -> None:
    _answer_version(patch, lambda payload: payload[:4] + b'{"capabilities": {"max_msg_fds": 17}}\0')


@breaks("vfio-user/version-bad-json")
def reads_over_bad_json(patch: pytest.MonkeyPatch) -> None:
    def negotiate(original: Any, body: Any, **named: Any) -> Any:
        try:
            return original(body, **named)
        except PeerError:
            return original(bytes(body[:4]), **named)

    around(patch, session, "negotiate", negotiate)


@breaks("vfio-user/version-twice")
def negotiates_again(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(dispatch._HANDLERS, Command.VERSION, lambda *_: Response(b"\0\0\0\0"))


# ---- messages ----------------------------------------------------------------------------------------------------


@breaks("vfio-user/message-id")
def has_ids_of_its_own(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, self: Session, data: bytes, *rest: Any) -> None:
        if data[2] == Command.DEVICE_GET_INFO:
            data = bytes([data[0] ^ 1]) + data[1:]
        original(self, data, *rest)

    around(patch, Session, "_send", send)


@breaks("vfio-user/no-reply", logs="access of 1 bytes at 0x10000000000 is outside region 7")
def answers_posted_writes(patch: pytest.MonkeyPatch) -> None:
    def refuse(original: Any, self: Session, message_id: int, command: int, _flags: int, error: Exception) -> None:
        original(self, message_id, command, 0, error)

    around(patch, Session, "_refuse", refuse)


@breaks("vfio-user/order")
def answers_one_request_late(patch: pytest.MonkeyPatch) -> None:
    late: list[bytes] = []

    def send(original: Any, self: Session, data: bytes, *rest: Any) -> None:
        if data[2] == Command.DEVICE_GET_INFO:
            late.append(data)
            return
        original(self, data, *rest)
        while late:
            original(self, late.pop())

    around(patch, Session, "_send", send)


@breaks("vfio-user/unknown-command")
def knows_every_command(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, function: Any, message: Any, negotiated: Any) -> Response:
        return Response() if message.command > 18 else original(function, message, negotiated)

    around(patch, session, "dispatch", take)


@breaks("vfio-user/error-reply", logs="command 0xc8: unknown|is outside region 7")
def explains_errors(patch: pytest.MonkeyPatch) -> None:
    def error_reply(_original: Any, message_id: int, command: int, number: int) -> bytes:
        return HEADER_CODEC.pack(message_id, command, HEADER_CODEC.size + 4, 0x21, number) + b"why?"

    around(patch, session, "error_reply", error_reply)


@breaks("vfio-user/size-below-header")
def does_not_mind_small_sizes(patch: pytest.MonkeyPatch) -> None:
    def unpack(original: Any, *arguments: Any) -> Any:
        message_id, command, size, *rest = original(*arguments)
        return (message_id, command, max(size, HEADER_CODEC.size), *rest)

    around(patch, connection, "_unpack", unpack)


@breaks("vfio-user/size-above-limit", logs="the client went in the middle of a message")
def waits_for_any_size(patch: pytest.MonkeyPatch) -> None:
    def find(original: Any, self: Connection) -> bool:
        try:
            return bool(original(self))
        except PeerError:
            return False

    around(patch, Connection, "next", find)
    around(patch, Connection, "_allocate", lambda original, self, capacity: original(self, min(capacity, 1 << 20)))


@breaks("vfio-user/short-payload", logs="0x0 is not a range|needs exactly one DATA and one ACTION|bytes are allowed")
def fills_short_payloads_up(patch: pytest.MonkeyPatch) -> None:
    def fields(_original: Any, layout: Any, message: Any) -> Any:
        return layout.unpack_from(bytes(message.body).ljust(layout.size, b"\0"))

    around(patch, dispatch, "_fields", fields)


@breaks("vfio-user/pieces")
def forgets_half_a_message(patch: pytest.MonkeyPatch) -> None:
    def process(original: Any, self: Session) -> bool:
        more = bool(original(self))
        if not more:
            self._main.connection.position = self._main.connection.end
        return more

    around(patch, Session, "_process", process)


@breaks("vfio-user/unexpected-fds")
def keeps_fds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch, "close_all", lambda _fds: None)


@breaks("vfio-user/disconnect", logs="the client went in the middle of a message")
def mourns_a_client(patch: pytest.MonkeyPatch) -> None:
    async def disconnected(original: Any, self: Server, ended: Session, *rest: Any) -> None:
        buffered = ended._main.connection
        if buffered.end > buffered.position:
            await trio.sleep_forever()
        await original(self, ended, *rest)

    around(patch, Server, "_disconnected", disconnected)


@breaks("vfio-user/reply-type")
def is_stunned_by_a_reply(patch: pytest.MonkeyPatch) -> None:
    def receive(_original: Any, self: Session, _message: Any) -> None:
        self._held, self._fast = True, False

    around(patch, Session, "_receive_reply", receive)


# ---- commands ----------------------------------------------------------------------------------------------------


@breaks("vfio-user/device-info", logs="argsz 0x4 is below 0x10")
def has_five_regions(patch: pytest.MonkeyPatch) -> None:
    def info(original: Any, self: PciFunction) -> DeviceInfo:
        found: DeviceInfo = original(self)
        return dataclasses.replace(found, num_regions=5)

    around(patch, PciFunction, "device_info", info)


@breaks("vfio-user/argsz", logs="too long")
def wants_the_exact_payload(patch: pytest.MonkeyPatch) -> None:
    def fields(original: Any, layout: Any, message: Any) -> Any:
        if message.command == Command.DEVICE_GET_INFO and len(message.body) != layout.size:
            raise PeerError("too long")
        return original(layout, message)

    around(patch, dispatch, "_fields", fields)


@breaks("vfio-user/region-info", logs="argsz 0x8 is below 0x20")
def has_a_thousand_regions(patch: pytest.MonkeyPatch) -> None:
    def info(original: Any, self: PciFunction, index: int) -> RegionInfo:
        return original(self, index) if index < 9 else RegionInfo()

    around(patch, PciFunction, "region_info", info)


@breaks("vfio-user/irq-info")
def has_a_thousand_irqs(patch: pytest.MonkeyPatch) -> None:
    def info(original: Any, self: PciFunction, index: int) -> IrqInfo:
        return original(self, index) if index < 5 else IrqInfo(IrqInfoFlags.EVENTFD, 0)

    around(patch, PciFunction, "irq_info", info)


def _change_answer(patch: pytest.MonkeyPatch, command: Command, change: Any) -> None:
    def answer(original: Any, self: Session, message: Any, given: Response) -> None:
        if message.command == command:
            given = given._replace(payload=change(given.payload))
        original(self, message, given)

    around(patch, Session, "_answer", answer)


@breaks("qemu/reply-size")
def answers_with_too_much(patch: pytest.MonkeyPatch) -> None:
    _change_answer(patch, Command.DEVICE_GET_REGION_INFO, lambda payload: payload + bytes(16))


@breaks(
    "vfio-user/access-bounds", logs="is outside region 7|which is absent|bytes are allowed|more complaints like these"
)
def has_no_bounds(patch: pytest.MonkeyPatch) -> None:
    def read(original: Any, self: ConfigSpace, offset: int, count: int) -> bytes:
        return bytes(original(self, offset, count)) if offset + count <= self.size else bytes(count)

    around(patch, ConfigSpace, "read", read)


@breaks("vfio-user/access-reply", logs="REGION_WRITE: reply with id 0x5, of no request under way")
def confirms_writes_briefly(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, self: MessageSocket, data: bytes, *rest: Any) -> Any:
        if data[2] == Command.REGION_WRITE:
            data = reply(int.from_bytes(data[:2], "little"), Command.REGION_WRITE)
        return original(self, data, *rest)

    around(patch, MessageSocket, "send", send)


@breaks("vfio-user/write-data")
def makes_data_up(patch: pytest.MonkeyPatch) -> None:
    write = dispatch._HANDLERS[Command.REGION_WRITE]

    def padded(function: Any, message: Any, negotiated: Any) -> Response:
        count = REGION_ACCESS_CODEC.unpack_from(message.body)[2]
        message.body = bytes(message.body).ljust(REGION_ACCESS_CODEC.size + count, b"\0")
        return write(function, message, negotiated)

    patch.setitem(dispatch._HANDLERS, Command.REGION_WRITE, padded)


@breaks("vfio-user/dma-map-argsz", logs="is not a range|more complaints like these")
def ignores_argsz(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch, "_check_argsz", lambda *_: None)


@breaks("vfio-user/dma-map-overlap", "vfio-user/dma-map-short-file")
def maps_anything(patch: pytest.MonkeyPatch) -> None:
    def dma_map(original: Any, self: GuestMemory, *arguments: Any, **named: Any) -> None:
        try:
            original(self, *arguments, **named)
        except PeerError:
            pass

    around(patch, GuestMemory, "map", dma_map)


@breaks("vfio-user/dma-unmap-reply")
def unmaps_without_a_word(patch: pytest.MonkeyPatch) -> None:
    _change_answer(patch, Command.DMA_UNMAP, lambda _payload: b"")


@breaks("qemu/dma-unmap-nothing", logs="no such mapping")
def unmaps_only_what_is_there(patch: pytest.MonkeyPatch) -> None:
    def unmap(original: Any, self: GuestMemory, address: int, size: int) -> Any:
        if not any(region.address == address for region in self.regions):
            raise PeerError("no such mapping", errno.ENOENT)
        return original(self, address, size)

    around(patch, GuestMemory, "unmap", unmap)


@breaks("vfio-user/dma-messages", logs="memory without a file descriptor")
def needs_fds(patch: pytest.MonkeyPatch) -> None:
    def dma_map(original: Any, self: GuestMemory, *arguments: Any, fd: int | None, **named: Any) -> None:
        if fd is None:
            raise PeerError("memory without a file descriptor")
        original(self, *arguments, fd=fd, **named)

    around(patch, GuestMemory, "map", dma_map)


@breaks("vfio-user/set-irqs-refused")
def takes_any_set_irqs(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(dispatch._HANDLERS, Command.DEVICE_SET_IRQS, lambda *_: Response())


@breaks("vfio-user/irq-trigger")
def triggers_the_wrong_vector(patch: pytest.MonkeyPatch) -> None:
    def trigger(original: Any, self: Msix, vectors: Any) -> None:
        original(self, [(vector + 1) % self.count for vector in vectors])

    around(patch, Msix, "trigger", trigger)


@breaks("qemu/reset-keeps-memory", logs="broke virtio.* no memory is mapped at 0x")
def forgets_memory_at_reset(patch: pytest.MonkeyPatch) -> None:
    def reset(original: Any, self: PciFunction) -> Any:
        self.memory.unmap(0, 1 << 64)
        return original(self)

    around(patch, PciFunction, "reset", reset)


@breaks("vfio-user/twin-socket", logs="RAM .* no file descriptor")
def forgets_its_twin(patch: pytest.MonkeyPatch) -> None:
    around(patch, Session, "_send", lambda original, self, data, fds=(), _channel=None: original(self, data, fds))


def sends_nothing_by_its_twin(patch: pytest.MonkeyPatch) -> None:
    """It agrees on a twin socket, and has no DMA messages, as SPDK's target."""

    def send(original: Any, self: Session, data: Any, fds: Any = (), channel: Any = None) -> Any:
        return None if channel is not None else original(self, data, fds)

    around(patch, Session, "_send", send)


@breaks("vfio-user/io-fds", logs="GET_REGION_IO_FDS index 0x3e8: there are 9", poll="off")
def never_looks_at_ioeventfds(patch: pytest.MonkeyPatch) -> None:
    async def watch(*_: Any) -> None:
        await trio.sleep_forever()

    patch.setattr("vfiouser_virtio.transports.pci.watch", watch)


@breaks("vfio-user/write-multi")
def writes_once(patch: pytest.MonkeyPatch) -> None:
    write = dispatch._HANDLERS[Command.REGION_WRITE_MULTI]

    def first(function: Any, message: Any, negotiated: Any) -> Response:
        count = bytes(message.body[:8])
        message.body = (1).to_bytes(8, "little") + bytes(message.body[8:])
        return write(function, message, negotiated)._replace(payload=count)

    write_multiple(patch)
    patch.setitem(dispatch._HANDLERS, Command.REGION_WRITE_MULTI, first)
