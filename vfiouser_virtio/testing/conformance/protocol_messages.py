"""vfio-user (QEMU docs/interop/vfio-user.rst): header, order, errors, fds, and the end of a connection."""

import os
import select
import struct

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    HEADER_CODEC,
    REGION_ACCESS_CODEC,
    Command,
    Direction,
    MessageFlags,
    PciRegion,
)
from vfiouser_virtio.testing.conformance.checks import SHOULD, wire_check
from vfiouser_virtio.testing.conformance.verdicts import expect, fail, note
from vfiouser_virtio.testing.conformance.wire import Wire
from vfiouser_virtio.vfio_user import SPDK_OPTIONS, Client, ClientOptions, Message

_INFO = DEVICE_INFO.build({"argsz": DEVICE_INFO.sizeof(), "flags": 0, "num_regions": 0, "num_irqs": 0})
_UNKNOWN = (19, 200, 0xFFFF)
_LINE = 0x3C  # interrupt_line: a register that every function has, and that means nothing to it
_BURST = 32


async def _alive(client: Client, after: str) -> None:
    """The connection still works."""
    reply = await client.exchange(Command.DEVICE_GET_INFO, _INFO)
    expect(not reply.flags & MessageFlags.ERROR, f"DEVICE_GET_INFO fails with errno {reply.error} after {after}")


@wire_check(
    "vfio-user/message-id", section="Header", observe="ids 0, 1, 65535 and the same one again, and SPDK's: 0 always"
)
async def message_id(wire: Wire) -> None:
    """A reply has the message id and the command of its request, which need not be unique."""
    async with wire.connect() as client:
        for number in (0, 1, 0xFFFF, 0x1234, 0x1234):
            await client.exchange(Command.DEVICE_GET_INFO, _INFO, message_id=number)
    async with wire.connect(SPDK_OPTIONS) as client:
        for _ in range(3):
            await client.device_info()


@wire_check(
    "vfio-user/no-reply",
    section="Header",
    observe="writes with NO_REPLY, one of them refused, then a read: its reply comes first",
)
async def no_reply(wire: Wire) -> None:
    """A message with the NO_REPLY flag is not answered, not even by an error."""
    async with wire.connect() as client:
        for offset in (_LINE, 1 << 40, _LINE):
            client.region_post(PciRegion.CONFIG, offset, b"\x0b")
        seen = await client.config_read(_LINE, 1)
        expect(seen == 0x0B, f"interrupt_line is {seen:#x} after a posted write of 0xb")


@wire_check(
    "vfio-user/order",
    section="Message Protocol",
    observe="32 requests in one go: order of the ids of the replies; 32 posted writes, then a read",
)
async def order(wire: Wire) -> None:
    """Messages are carried out, and answered, in the order in which they were sent."""
    ids: list[int] = []

    def note(direction: Direction, message: Message) -> None:
        if direction is Direction.SERVER_TO_CLIENT and message.is_reply:
            ids.append(message.id)

    async with wire.connect(ClientOptions(trace=note)) as client:
        ids.clear()
        access = REGION_ACCESS_CODEC.pack(0, PciRegion.CONFIG, 4)
        async with trio.open_nursery() as nursery:
            for number in range(_BURST):
                command, payload = ((Command.DEVICE_GET_INFO, _INFO), (Command.REGION_READ, access))[number % 2]
                nursery.start_soon(_exchange, client, command, payload)
        expect(len(ids) == _BURST, f"{len(ids)} replies to {_BURST} requests")
        first = ids[0]
        in_order = all(number == (first + place) & 0xFFFF for place, number in enumerate(ids))
        expect(in_order, f"the replies came in the order {ids}")
        for value in range(_BURST):
            client.region_post(PciRegion.CONFIG, _LINE, bytes([value]))
        seen = await client.config_read(_LINE, 1)
        expect(seen == _BURST - 1, f"a read after {_BURST} posted writes sees that of {seen}")


async def _exchange(client: Client, command: int, payload: bytes) -> None:
    try:
        await client.exchange(command, payload)
    except PeerError:
        pass  # what has not been answered is missing among the ids


@wire_check(
    "vfio-user/unknown-command", section="Commands", observe="commands 19, 200 and 65535: an error, and it goes on"
)
async def unknown_command(wire: Wire) -> None:
    """A command that the server does not know gets an error reply."""
    async with wire.connect() as client:
        for command in _UNKNOWN:
            reply = await client.exchange(command, bytes(16))
            note(bool(reply.flags & MessageFlags.ERROR), f"command {command} was answered without an error")
        await _alive(client, "unknown commands")


@wire_check(
    "vfio-user/error-reply",
    section="Header",
    observe="size and errno of the replies to requests that must fail",
)
async def error_reply(wire: Wire) -> None:
    """An error reply has the ERROR flag, a positive errno, and no payload."""
    async with wire.connect() as client:
        wrong = REGION_ACCESS_CODEC.pack(1 << 40, PciRegion.CONFIG, 4)
        for command, payload in ((200, bytes(64)), (Command.REGION_READ, wrong)):
            reply = await client.exchange(command, payload)
            note(bool(reply.flags & MessageFlags.ERROR), f"command {command} did not fail")
            note(0 < reply.error < 4096, f"command {command}: errno {reply.error}")
            note(not reply.payload, f"command {command}: an error reply with {len(reply.payload)} bytes of payload")


@wire_check(
    "vfio-user/size-below-header",
    section="Header",
    observe="DEVICE_RESET of 8 bytes by its header: an error, or the end; then another connection",
)
async def size_below_header(wire: Wire) -> None:
    """A message that is smaller than its header is not carried out."""
    async with wire.connect() as client:
        try:
            reply = await client.exchange(Command.DEVICE_RESET, size=8)
            expect(bool(reply.flags & MessageFlags.ERROR), "DEVICE_RESET of 8 bytes was carried out")
        except PeerError:
            expect(not client.alive, "neither an answer nor an end")
    async with wire.connect() as client:
        await _alive(client, "a message of 8 bytes on an earlier connection")


@wire_check(
    "vfio-user/size-above-limit",
    section="Header",
    observe="a header that announces 4 GiB: an error, or the end; then another connection",
)
async def size_above_limit(wire: Wire) -> None:
    """A message larger than what was negotiated does not make the server wait for it, nor run out of memory."""
    async with wire.connect() as client:
        client.send_raw(HEADER_CODEC.pack(0, Command.REGION_WRITE, 0xFFFF_FFFF, 0, 0) + bytes(1024))
        with trio.move_on_after(wire.timeout):
            await client.wait_closed()
        expect(not client.alive, "the server waits for 4 GiB of one message")
    async with wire.connect() as client:
        await _alive(client, "a message of 4 GiB on an earlier connection")


@wire_check(
    "vfio-user/short-payload",
    section="Commands",
    observe="every command that needs a payload with 1 byte of it: an error, and the connection goes on",
)
async def short_payload(wire: Wire) -> None:
    """A payload that is shorter than the command's structure is refused."""
    async with wire.connect() as client:
        for command in (
            Command.DMA_MAP,
            Command.DMA_UNMAP,
            Command.DEVICE_GET_INFO,
            Command.DEVICE_GET_REGION_INFO,
            Command.DEVICE_GET_IRQ_INFO,
            Command.DEVICE_SET_IRQS,
            Command.REGION_READ,
            Command.REGION_WRITE,
        ):
            reply = await client.exchange(command, b"\x20")
            note(bool(reply.flags & MessageFlags.ERROR), f"{command.name} with 1 byte of payload was carried out")
        await _alive(client, "short payloads")


@wire_check(
    "vfio-user/pieces",
    section="Message Protocol",
    observe="a request byte by byte, and two requests in one write",
)
async def pieces(wire: Wire) -> None:
    """Messages are found in the stream by their size, however the bytes arrive."""
    async with wire.connect() as client:
        header = HEADER_CODEC.pack(7, Command.REGION_WRITE, 33, MessageFlags.NO_REPLY, 0)
        message = header + REGION_ACCESS_CODEC.pack(_LINE, PciRegion.CONFIG, 1) + b"\x2a"
        for byte in message:
            client.send_raw(bytes([byte]))
            await client.flush()
        await trio.lowlevel.checkpoint()
        seen = await client.config_read(_LINE, 1)
        expect(seen == 0x2A, f"a write that came byte by byte was not carried out: {seen:#x}")
        client.send_raw(message[:-1] + b"\x01" + message[:-1] + b"\x02")
        seen = await client.config_read(_LINE, 1)
        expect(seen == 2, f"of two writes in one piece the last one is not seen: {seen:#x}")


@wire_check(
    "vfio-user/unexpected-fds",
    section="Message Protocol",
    observe="a pipe's write end with DEVICE_GET_INFO and with an unknown command: end of file at the read end",
)
async def unexpected_fds(wire: Wire) -> None:
    """File descriptors that a command does not take are closed; they never pile up."""
    async with wire.connect() as client:
        for command, payload in ((Command.DEVICE_GET_INFO, _INFO), (200, b"")):
            reader, writer = os.pipe()
            try:
                try:
                    await client.exchange(command, payload, [writer])
                finally:
                    os.close(writer)
                with trio.move_on_after(wire.timeout):
                    await trio.lowlevel.wait_readable(reader)
                closed = bool(select.select([reader], [], [], 0)[0])
                expect(closed, f"command {command}: the server keeps a file descriptor that nothing asked for")
            finally:
                os.close(reader)
        await _alive(client, "file descriptors that nothing asked for")


@wire_check(
    "vfio-user/disconnect",
    section="Socket Disconnection Behavior",
    observe="go in the middle of a header, of a payload, of a request; connect again each time",
)
async def disconnect(wire: Wire) -> None:
    """When a client goes, even in the middle of a message, the server serves the next one."""
    for data in (
        b"\x01\x02\x03",
        struct.pack("<HHIII", 0, Command.REGION_WRITE, 64, 0, 0) + b"\x00",
        struct.pack("<HHIII", 0, Command.DEVICE_RESET, 16, 0, 0),
    ):
        async with wire.connect() as client:
            client.send_raw(data)
            await client.flush()
            client.disconnect()
    async with wire.connect() as client:
        await _alive(client, "three clients that went in the middle of a message")


@wire_check(
    "vfio-user/reply-type",
    section="Header",
    keyword=SHOULD,
    observe="a reply that nothing asked for, then a request: the connection goes on, or ends and the next one works",
)
async def unasked_reply(wire: Wire) -> None:
    """A reply that nothing has asked for does not stop the server."""
    async with wire.connect() as client:
        client.send_raw(HEADER_CODEC.pack(99, Command.DMA_READ, HEADER_CODEC.size, MessageFlags.REPLY, 0))
        try:
            await _alive(client, "a reply that nothing asked for")
        except PeerError:
            if client.alive:
                fail("no answer after a reply that nothing asked for")
    async with wire.connect() as client:
        await _alive(client, "a reply that nothing asked for on an earlier connection")
