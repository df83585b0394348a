"""vfio-user messages that no client should send, and clients that come and go as none should."""

import json
import os
import socket
import struct

import pytest
import trio
import trio.testing
from support.hostile import Attack, attacked
from support.hostile_messages import access, dma_map, irq_set

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import Command, IrqSetFlags, MessageFlags, PciIrq, PciRegion
from vfiouser_virtio.testing.fuzz import fd_kinds
from vfiouser_virtio.testing.fuzz.client import hello
from vfiouser_virtio.testing.raw.client import MAX_MESSAGE_SIZE, raw_message
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR

STATUS = COMMON + 0x14


async def hung_up(attack: Attack) -> None:
    """The server closes the connection."""
    await attack.client.closed.wait()


@pytest.mark.parametrize("size", [0, 15, MAX_MESSAGE_SIZE + 1, 0xFFFF_FFFF], ids=hex)
async def test_a_size_that_no_message_has(size: int) -> None:
    """Less than a header, or more than was agreed: where the next message begins is not known any more."""
    async with attacked() as attack:
        await attack.client.send(raw_message(Command.DEVICE_GET_INFO, bytes(16), size=size))
        await hung_up(attack)


@pytest.mark.parametrize("count", [3, 5, 1 << 20, 0])
async def test_a_size_that_is_not_that_of_the_data(count: int) -> None:
    """REGION_WRITE of more, or fewer, bytes than come with it; what is too long is ignored as SPDK needs it."""
    async with attacked() as attack:
        reply = await attack.message(Command.REGION_WRITE, access(PciRegion.CONFIG, 0x3C, count) + bytes(4))
        assert reply is not None
        assert bool(reply.error) == (count not in (3, 4))


@pytest.mark.parametrize("argsz", [0, 1, 15, 0x7FFF_FFFF, 0xFFFF_FFFF], ids=hex)
async def test_an_argsz_that_is_too_short_or_huge(argsz: int) -> None:
    """Too short is refused; huge means no more than there is, and is no allocation."""
    async with attacked() as attack:
        for command, length in (
            (Command.DEVICE_GET_INFO, 16),
            (Command.DEVICE_GET_REGION_INFO, 32),
            (Command.DEVICE_GET_REGION_IO_FDS, 16),
            (Command.DEVICE_GET_IRQ_INFO, 16),
        ):
            reply = await attack.message(command, argsz.to_bytes(4, "little").ljust(length, b"\0"))
            assert reply is not None
            assert bool(reply.error) == (argsz < length)


async def test_payloads_that_end_early() -> None:
    """Every command, with every number of bytes less than its fixed part has."""
    async with attacked(lines=len(Command) + 2) as attack:
        for command in Command:
            if command != Command.DEVICE_RESET:
                for length in (0, 1, 7, 15):
                    assert await attack.refused(command, bytes(length))


@pytest.mark.parametrize("command", [0, 19, 0x7FFF, 0xFFFF])
async def test_an_unknown_command(command: int) -> None:
    """It is refused, and nothing else."""
    async with attacked() as attack:
        assert await attack.refused(command, bytes(64)) == 38  # ENOSYS


async def test_a_reply_that_was_not_asked_for() -> None:
    """A client sends replies, to requests that the server has not made."""
    async with attacked() as attack:
        for command in (Command.DMA_READ, Command.DMA_WRITE, Command.DEVICE_GET_INFO, 0xFFFF):
            for flags in (MessageFlags.REPLY, MessageFlags.REPLY | MessageFlags.ERROR):
                await attack.client.send(raw_message(command, bytes(32), message_id=5, flags=flags))
        await attack.settle()


@pytest.mark.parametrize("kind", [2, 3, 0xF], ids=hex)
async def test_a_message_type_that_there_is_not(kind: int) -> None:
    """Neither request nor reply: the connection ends."""
    async with attacked() as attack:
        await attack.client.send(raw_message(Command.DEVICE_GET_INFO, bytes(16), flags=kind))
        await hung_up(attack)


async def test_an_id_that_is_used_again() -> None:
    """Several requests with one id, before any of them is answered: each is answered, in order."""
    async with attacked() as attack:
        asked = [
            await attack.client.send(raw_message(command, body, message_id=9))
            for command, body in (
                (Command.REGION_READ, access(VIRTIO_BAR, STATUS, 1)),
                (Command.REGION_READ, access(PciRegion.CONFIG, 0, 4)),
                (Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)),
            )
        ]
        sizes = [reply.size for each in asked if (reply := await attack.client.result(each)) is not None]
        assert sizes == [33, 36, 32]


async def test_version_twice() -> None:
    """The second is refused, and what was agreed holds."""
    async with attacked() as attack:
        for _ in range(3):
            assert await attack.refused(Command.VERSION, hello())


@pytest.mark.parametrize("command", [Command.DMA_MAP, Command.REGION_READ, Command.DEVICE_RESET, 0xFFFF])
async def test_version_is_not_first(command: int) -> None:
    """Anything before VERSION ends the connection."""
    async with attacked(hello=False, up=False) as attack:
        await attack.client.send(raw_message(command, bytes(32), message_id=1))
        await hung_up(attack)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "[]", '{"capabilities": []}', '{"capabilities": {', "\x00", "nan",
     json.dumps({"capabilities": {"max_msg_fds": -1}}), json.dumps({"capabilities": {"max_data_xfer_size": 1 << 70}}),
     json.dumps({"capabilities": {"max_msg_fds": "\x1b[2J\n" * 1000}})],
    ids=["nested", "nested-objects", "a-number", "list", "no-object", "cut", "nul", "nan", "negative", "huge", "text"],
)  # fmt: skip
async def test_version_with_bad_json(text: str) -> None:
    """Nested, huge, cut off, or of other types: refused and the connection closed, or taken, but never more."""
    async with attacked(hello=False, up=False) as attack:
        reply = await attack.message(Command.VERSION, hello(text=text))
        if reply is None or reply.error:
            await hung_up(attack)
        assert not any("\x1b" in line or "\n" in line for line in attack.log)
        assert all(len(line) < 1000 for line in attack.log)


@pytest.mark.parametrize(
    "payload", [b"", b"\0", b"\0\0\0", b"\1\0\0\0", b"\0\0\0\0{}", b"\0\0\0\0\xff\0"], ids=bytes.hex
)
async def test_version_with_a_bad_payload(payload: bytes) -> None:
    """Too short, of another major version, without its NUL, or no text."""
    async with attacked(hello=False, up=False) as attack:
        reply = await attack.message(Command.VERSION, payload)
        assert reply is None or reply.error
        await hung_up(attack)


@pytest.mark.parametrize("count", [17, 40, 100])
async def test_too_many_file_descriptors(count: int) -> None:
    """More than were agreed: the message is refused, and all of them closed."""
    async with attacked() as attack:
        fds = [os.eventfd(0) for _ in range(count)]
        assert await attack.refused(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1), fds)
        close_all(fds)


async def test_no_file_descriptors() -> None:
    """SET_IRQS without its eventfds takes those away that there are; DMA_MAP without one is memory by message."""
    async with attacked() as attack:
        for start, count in ((0, 3), (2, 1)):
            await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, start, count))
        assert await attack.refused(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 4))
        await attack.accepted(Command.DMA_MAP, dma_map(0x10_0000, 0x1000))


async def test_file_descriptors_of_wrong_kinds() -> None:
    """What is no eventfd is none for interrupts, what is no file is no memory: refused, closed, never waited for."""
    async with attacked(lines=60) as attack:
        for kind in fd_kinds.KINDS:
            fd = fd_kinds.make(kind, attack.ram.fd)
            reply = await attack.message(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1), [fd])
            assert reply is not None
            assert bool(reply.error) == (not kind.startswith("eventfd"))
            reply = await attack.message(Command.DMA_MAP, dma_map(0x10_0000, 0x40000), [fd])
            assert reply is not None
            if reply.error == 0:
                assert kind.startswith(("memfd", "ram"))
                await attack.performer.driver.unmap_all()
                await attack.performer.driver.map()
            os.close(fd)


@pytest.mark.parametrize("region", [0, 2, 3, 5, 6, 8, 9, 0x7FFF_FFFF, 0xFFFF_FFFF])
async def test_a_region_that_there_is_not(region: int) -> None:
    """Reads and writes of it are refused; its information is that of nothing, or refused."""
    async with attacked() as attack:
        assert await attack.refused(Command.REGION_READ, access(region, 0, 4))
        assert await attack.refused(Command.REGION_WRITE, access(region, 0, 4) + bytes(4))
        reply = await attack.message(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0))
        assert reply is not None
        assert reply.error or not int.from_bytes(reply.body[16:24], "little")


async def test_offsets_and_counts_that_overflow() -> None:
    """Zero, too many, behind the end, past 2^64."""
    top = 1 << 64
    async with attacked() as attack:
        for region, offset, count in (
            (VIRTIO_BAR, 0, 0), (VIRTIO_BAR, 0, (1 << 20) + 1), (VIRTIO_BAR, 0, 0xFFFF_FFFF), (VIRTIO_BAR, 0x3FFF, 2),
            (VIRTIO_BAR, 0x4000, 1), (VIRTIO_BAR, top - 1, 1), (VIRTIO_BAR, top - 4, 8), (VIRTIO_BAR, 1 << 32, 4),
            (PciRegion.CONFIG, 0xFFF, 2), (PciRegion.CONFIG, 0x1000, 1), (PciRegion.CONFIG, top - 2, 2), (1, 0xFFF, 4),
        ):  # fmt: skip
            assert await attack.refused(Command.REGION_READ, access(region, offset, count))
            data = bytes(min(count, 64))
            assert await attack.refused(Command.REGION_WRITE, access(region, offset, count) + data)


async def test_interrupts_that_there_are_not() -> None:
    """SET_IRQS: counts, starts, flags and sizes of data that do not go together."""
    trigger, mask = IrqSetFlags.ACTION_TRIGGER, IrqSetFlags.ACTION_MASK
    none, bools, eventfds = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
    async with attacked() as attack:
        for index, start, count, flags in (
            (PciIrq.MSIX, 0, 4, none | trigger), (PciIrq.MSIX, 3, 1, none | trigger),
            (PciIrq.MSIX, 0xFFFF_FFFF, 1, none | trigger), (PciIrq.MSIX, 1, 0xFFFF_FFFF, none | trigger),
            (PciIrq.MSIX, 0, 0, eventfds | trigger), (PciIrq.MSIX, 1, 0, none | trigger),
            (PciIrq.MSIX, 0, 3, bools | trigger), (PciIrq.MSIX, 0, 1, none | bools | trigger),
            (PciIrq.MSIX, 0, 1, none), (PciIrq.MSIX, 0, 1, trigger), (PciIrq.MSIX, 0, 1, none | trigger | mask),
            (PciIrq.MSIX, 0, 1, 0xFFFF_FFFF), (PciIrq.MSIX, 0, 1, none | mask), (PciIrq.INTX, 0, 2, none | mask),
            (PciIrq.MSI, 0, 1, none | trigger), (5, 0, 0, none | trigger), (0xFFFF_FFFF, 0, 1, none | trigger),
        ):  # fmt: skip
            assert await attack.refused(Command.DEVICE_SET_IRQS, irq_set(index, start, count, flags)), (start, flags)


async def test_a_reset_while_requests_are_under_way() -> None:
    """DEVICE_RESET behind slow requests: its answer waits for them, and nothing of them comes after it."""
    async with attacked() as attack:
        for _ in range(8):
            attack.driver.offer(0, [b"S" * 8], [8])
        await attack.kick()
        await attack.accepted(Command.DEVICE_RESET)
        attack.bounds.check()
        attack.bounds.forget()
        await trio.sleep(0.03)  # as long as they take
        attack.bounds.check()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
async def test_a_client_that_leaves_in_the_middle_of_a_message(length: int) -> None:
    """The rest never comes."""
    async with attacked() as attack:
        message = raw_message(Command.REGION_WRITE, access(PciRegion.CONFIG, 0x3C, 400) + bytes(400))
        attack.client.in_step = False
        await attack.client.send(message[:length], [attack.ram.fd])
        attack.client.close()


async def test_a_message_that_comes_byte_by_byte() -> None:
    """A slow sender: every byte is a write of its own, the file descriptor rides on the first."""
    async with attacked() as attack:
        for command, body, fds in (
            (Command.REGION_READ, access(VIRTIO_BAR, STATUS, 1), ()),
            (Command.DMA_MAP, dma_map(0x10_0000, 0x1000), (attack.ram.fd,)),
            (Command.REGION_WRITE, access(PciRegion.CONFIG, 0x3C, 1) + b"\7", ()),
        ):
            message = raw_message(command, body, message_id=3)
            reply = await attack.client.result(await attack.client.send(message, fds, range(1, len(message))))
            assert reply is not None
            assert not reply.error


async def test_a_message_that_is_cut_at_every_byte() -> None:
    """In two pieces, wherever the cut is, with another message behind it and a file descriptor in front."""
    async with attacked() as attack:
        message = raw_message(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1), message_id=3)
        fd = os.eventfd(0)
        for cut in range(1, len(message)):
            asked = await attack.client.send(message, [fd], [cut])
            assert await attack.driver.read(PciRegion.CONFIG, 0, 2) == 0x1AF4
            reply = await attack.client.result(asked)
            assert reply is not None
            assert not reply.error
        os.close(fd)


async def test_a_client_that_says_nothing() -> None:
    """It connects, and that is all: the neighbour is served meanwhile, and the next client afterwards."""
    async with attacked(hello=False, up=False) as attack:
        await trio.testing.wait_all_tasks_blocked()
        attack.client.close()


async def flood(sock: socket.socket, data: bytes, limit: int = 64 << 20) -> int:
    """Send the same again and again, until the server does not take any more; how many bytes."""
    sent = idle = 0
    while idle < 20 and sent < limit:
        try:
            sent += sock.send(data)
            idle = 0
        except BlockingIOError:
            idle += 1
            await trio.testing.wait_all_tasks_blocked()
    return sent


@pytest.mark.parametrize("command", [0xFFFF, Command.DEVICE_GET_REGION_IO_FDS], ids=["small", "file-descriptors"])
async def test_a_client_that_reads_no_small_answers(command: int) -> None:
    """What waits for it is bounded in our memory and file descriptors, not in bytes of the messages alone."""
    async with attacked() as attack:
        with socket.socket(socket.AF_UNIX) as deaf:
            attack.client.close()
            await attack.client.closed.wait()
            deaf.connect(attack.served.listening.getsockname())
            deaf.setblocking(False)
            deaf.sendall(raw_message(Command.VERSION, hello()))
            before = len(os.listdir("/proc/self/fd"))
            body = struct.pack("<IIII", 4096, 0, VIRTIO_BAR, 0)
            await flood(deaf, raw_message(command, body if command != 0xFFFF else b"") * 1000, 8 << 20)
            assert len(os.listdir("/proc/self/fd")) < before + 600
            sent = await flood(deaf, raw_message(command, body if command != 0xFFFF else b"") * 1000, 8 << 20)
            assert sent < 1 << 20


@pytest.mark.parametrize("leaves", ["close", "shut-down", "half-message"])
async def test_a_client_that_reads_no_answers(leaves: str) -> None:
    """Its answers pile up no further than they may; then its requests are not read any more. The next one is served."""
    async with attacked() as attack:
        with socket.socket(socket.AF_UNIX) as deaf:
            attack.client.close()
            await attack.client.closed.wait()
            deaf.connect(attack.served.listening.getsockname())
            deaf.setblocking(False)
            deaf.sendall(raw_message(Command.VERSION, hello()))
            assert await flood(deaf, raw_message(Command.REGION_READ, access(PciRegion.CONFIG, 0, 4096)) * 50) < 4 << 20
            if leaves == "shut-down":
                deaf.shutdown(socket.SHUT_RDWR)
            elif leaves == "half-message":
                deaf.shutdown(socket.SHUT_WR)
                await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("kind", ["eventfd-full", "eventfd-full-blocking", "eventfd-semaphore"])
async def test_an_eventfd_that_is_full(kind: str) -> None:
    """An interrupt whose counter cannot grow is not waited for."""
    async with attacked() as attack:
        fd = fd_kinds.make(kind, attack.ram.fd)
        for index in (PciIrq.MSIX, PciIrq.INTX):
            await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(index, 0, 1), [fd])
            for _ in range(3):
                flags = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
                await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(index, 0, 1, flags))
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0
        os.close(fd)


async def test_an_eventfd_that_the_client_closes() -> None:
    """Ours is a copy: interrupts go nowhere, and the number is not another file's."""
    async with attacked() as attack:
        fd = os.eventfd(0)
        await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(PciIrq.INTX, 0, 1), [fd])
        os.close(fd)
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0
