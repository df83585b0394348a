"""One client on a real socket: recorded bytes, quirks, order, holds, fds, and what a hostile client tries.

A long file: one session, in as many situations, each of a few lines.
"""

import errno
import logging
import os
import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing
from support.echo_device import EchoDevice
from support.qemu_messages import (
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    VERSION,
    Connect,
    header,
    read,
    until,
    write,
)

from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import RawClient, RawMessage
from vfiouser_virtio.vfio_user import Listener
from vfiouser_virtio.vfio_user.wire.connection import MAX_MESSAGE_SIZE


async def test_recorded_bytes(
    qemu_listener: Listener, connect: Connect, device: EchoDevice, open_fds: Callable[[], int]
) -> None:
    assert len(VERSION) == 214
    client = connect()

    async def answer(request: bytes, *fds: int) -> bytes:
        await client.send(request, fds)
        return (await client.receive()).raw

    reply = await answer(VERSION)
    assert reply[:4] == VERSION[:4]
    assert reply[8:20] == bytes.fromhex("010000000000000000000000")
    assert len(reply) <= len(VERSION)
    assert reply[-1] == 0

    device.regions[7][:4] = b"\xf4\x1a\x42\x10"
    memory = os.memfd_create("ram")
    os.ftruncate(memory, 0x20000000)
    eventfd = os.eventfd(0)
    assert await answer(DMA_MAP, memory) == header(1, 2, 16, 1)
    assert await answer(GET_INFO) == bytes.fromhex("0300040020000000010000000000000010000000030000000900000005000000")
    assert await answer(REGION_READ) == header(0xC, 9, 32 + 256, 1) + REGION_READ[16:] + device.regions[7]
    assert await answer(REGION_WRITE) == header(0xE, 10, 32, 1) + REGION_WRITE[16:32]
    assert await answer(SET_IRQS, eventfd) == header(0x19, 8, 16, 1)
    assert await answer(RESET) == header(0x1E, 13, 16, 1)
    assert os.fstat(device.maps[0][1] or -1).st_ino == os.fstat(memory).st_ino
    assert await answer(DMA_UNMAP) == header(0x27, 3, 40, 1) + DMA_UNMAP[16:]
    os.close(memory)
    os.close(eventfd)
    assert device.calls[1:] == [
        ("dma_map", 0, 0x20000000, True, True, True, 0),
        ("region_read", 7, 0, 256),
        ("region_write", 7, 0x30, b"\x00\xf8\xff\xff"),
        ("set_irqs", 0, 0x24, 0, 1, b"", 1),
        ("reset",),
        ("dma_unmap", 0, 0x20000000),
    ]


async def test_the_same_one_byte_at_a_time(qemu_listener: Listener, connect: Connect, device: EchoDevice) -> None:
    client = connect()
    eventfd = os.eventfd(0)
    for message, fds in ((VERSION, ()), (SET_IRQS, (eventfd,)), (REGION_READ, ())):
        for index in range(len(message)):
            await client.send(message[index : index + 1], fds if index == 0 else ())
            await trio.lowlevel.checkpoint()
        reply = await client.receive()
        assert reply.flags == 1
    os.close(eventfd)
    assert len(device.irqs) == 1
    assert device.names() == ["connected", "set_irqs", "region_read"]


async def test_a_burst_with_and_without_fds_in_one_read(client: RawClient, device: EchoDevice) -> None:
    """QEMU pipelines DMA_MAPs; a ROM has no fd, and must not get that of the RAM behind it."""
    memory = [os.memfd_create(f"ram{number}") for number in range(20)]
    await client.send(client.request(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)) * 2)
    for number in range(40):
        payload = struct.pack("<IIQQQ", 32, 3, 0, number << 20, 1 << 20)
        fds = [memory[number // 2]] if number % 2 else []
        await client.send(client.request(Command.DMA_MAP, payload), fds)
    for _ in range(42):
        assert (await client.receive()).flags == 1
    for number in range(40):
        fd = device.maps[number << 20][1]
        assert (fd is not None) == bool(number % 2)
        if fd is not None:
            assert os.fstat(fd).st_ino == os.fstat(memory[number // 2]).st_ino
    for fd in memory:
        os.close(fd)


# The quirks of other clients


async def test_spdk(qemu_listener: Listener, connect: Connect, device: EchoDevice) -> None:
    client = connect()

    async def answer(command: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> RawMessage:
        await client.send(header(0, command, 16 + len(payload)) + payload, fds)  # every id is 0
        reply = await client.receive()
        assert (reply.id, reply.flags) == (0, 1)
        return reply

    assert (await answer(1, struct.pack("<HH", 0, 1))).raw == header(0, 1, 20, 1) + b"\0\0\1\0"
    reply = await answer(5, struct.pack("<IIIIQQ", 0xFE0, 0, 4, 0, 0, 0).ljust(4064, b"\0"))
    assert reply.body == struct.pack("<IIIIQQ", 32, 3, 4, 0, 0x4000, 0)
    memory = os.memfd_create("hugepages")
    await answer(2, struct.pack("<IIQQQ", 32, 3, 0, 0x200000000000, 1 << 30), (memory,))
    assert device.maps[0x200000000000][0] == 1 << 30
    await answer(10, write(7, 4, b"\6\1"))
    assert (await answer(9, read(4, 0x2000, 8))).size == 40
    before = len(os.listdir("/proc/self/fd"))
    await answer(3, struct.pack("<IIQQ", 24, 0, 0x200000000000, 1 << 30), (memory,))
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert device.maps == {}
    os.close(memory)


async def test_rust_vmm(client: RawClient) -> None:
    reply = await client.call(4, struct.pack("<4I", 32, 0, 0, 0))  # argsz counts the header
    assert reply.body == struct.pack("<4I", 16, 3, 9, 5)
    reply = await client.call(3, struct.pack("<IIQQ", 24, 0, 0x1000, 0x1000))
    assert reply.size == 40
    reply = await client.call(10, write(4, 0x14, b"\0"))
    assert reply.body == struct.pack("<QII", 0x14, 4, 1)
    fds = [os.eventfd(0) for _ in range(16)]
    reply = await client.call(8, struct.pack("<5I", 20, 0x24, 2, 0, 16), fds)
    assert (reply.flags, reply.size) == (1, 16)
    for fd in fds:
        os.close(fd)


# Replies, and none


async def test_posted_writes_are_never_answered(client: RawClient, device: EchoDevice) -> None:
    for index in range(3000):
        await client.send(client.request(10, write(4, index % 256, bytes([index % 256])), flags=0x10))
    await client.send(client.request(10, write(99, 0, b"x"), flags=0x10))  # refused
    await client.send(client.request(10, b"", flags=0x10))  # too short
    await client.send(client.request(0x99, b"", flags=0x10))  # unknown
    await client.send(client.request(13, b"", flags=0x10))
    reply = await client.call(9, read(4, 0, 256))
    assert reply.body[16:] == bytes(range(256))
    assert device.names().count("region_write") == 3001
    await client.silence()


async def test_replies_come_in_order(client: RawClient) -> None:
    commands = [4, 13, 9, 10, 0x77, 5, 9, 16, 3, 13, 7] * 20
    payloads = {4: struct.pack("<4I", 16, 0, 0, 0), 9: read(4, 0, 4), 10: write(4, 0, b"1234")}
    for command in commands:
        await client.send(client.request(command, payloads.get(command, b"")))
    first = client.last_id - len(commands) + 1
    for number, command in enumerate(commands):
        reply = await client.receive()
        assert (reply.id, reply.command) == (first + number, command)


async def test_an_error_reply_is_a_header(client: RawClient) -> None:
    for command, payload, number in [
        (0x77, b"abc", errno.ENOSYS),
        (14, bytes(8), errno.EOPNOTSUPP),
        (16, bytes(8), errno.ENOTTY),
        (17, bytes(8), errno.EOPNOTSUPP),
        (9, read(4, 0x4000, 1), errno.EINVAL),
        (9, read(77, 0, 1), errno.EINVAL),
        (1, struct.pack("<HH", 0, 0), errno.EINVAL),
    ]:
        reply = await client.call(command, payload)
        assert reply.raw == header(client.last_id, command, 16, 0x21, number)


async def test_a_bug_of_the_device_is_an_eio_and_a_traceback(
    client: RawClient, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.bug = ZeroDivisionError("the bug")
    for _ in range(5):
        reply = await client.call(9, read(4, 0, 4))
        assert (reply.flags, reply.error) == (0x21, errno.EIO)
    device.bug = None
    assert (await client.call(9, read(4, 0, 4))).flags == 1
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(records) == 1
    assert "REGION_READ" in records[0].getMessage()
    assert records[0].exc_info is not None


async def test_a_complaint_is_logged_once_and_counted(
    client: RawClient, listener: Listener, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    for offset in range(100):
        await client.call(9, read(77, offset, 1))
    client.close()
    await until(lambda: "disconnected" in device.names())
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 2
    assert "region 0x4d" in lines[0]
    assert [vars(each)["device"] for each in caplog.records if each.levelno == logging.WARNING] == [listener.name] * 2
    assert "99 more complaints" in lines[1]


async def test_asking_for_what_there_is_not_is_no_warning(
    client: RawClient, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert (await client.call(7, struct.pack("<4I", 16, 0, 3, 0))).error == errno.EINVAL
        assert (await client.call(16, struct.pack("<II", 8, 0x40001))).error == errno.ENOTTY
    client.close()
    await until(lambda: "disconnected" in device.names())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_large_read_reaches_a_slow_reader(client: RawClient, device: EchoDevice) -> None:
    device.regions[0] = bytearray(os.urandom(1 << 20))
    for _ in range(4):
        await client.send(client.request(9, read(0, 0, 1 << 20)))
    await trio.sleep(0.05)  # the server's socket is full now
    for _ in range(4):
        reply = await client.receive()
        assert reply.body[16:] == device.regions[0]


async def test_a_client_that_does_not_read_is_not_read_for_ever(client: RawClient, device: EchoDevice) -> None:
    device.regions[0] = bytearray(1 << 20)
    requests = client.request(9, read(0, 0, 1 << 20)) * 200
    await client.send(requests)
    await until(lambda: device.names().count("region_read") >= 16)
    await trio.sleep(0.1)
    # 16 MiB are queued, and what was handled in one batch beyond that
    assert device.names().count("region_read") <= 16 + 32 + 1
    for _ in range(200):
        assert (await client.receive()).size == 32 + (1 << 20)


async def test_fds_of_regions_arrive(client: RawClient, device: EchoDevice, open_fds: Callable[[], int]) -> None:
    memory = os.memfd_create("bar")
    device.region_fds[4] = (memory,)
    before = open_fds()
    reply = await client.call(5, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0))
    assert reply.body[4:8] == b"\7\0\0\0"
    assert [os.fstat(fd).st_ino for fd in reply.fds] == [os.fstat(memory).st_ino]
    os.close(reply.fds[0])
    assert open_fds() == before
    os.close(memory)


async def test_fds_of_a_reply_that_has_to_queue(client: RawClient, device: EchoDevice) -> None:
    device.regions[0] = bytearray(1 << 20)
    memory = os.memfd_create("bar")
    device.region_fds[4] = (memory,)
    await client.send(client.request(9, read(0, 0, 1 << 20)))
    await client.send(client.request(5, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0)))
    await client.send(client.request(13))
    await until(lambda: "reset" in device.names())
    inode = os.fstat(memory).st_ino
    os.close(memory)  # the device is done with it; the queued reply has its own
    assert (await client.receive()).fds == []
    reply = await client.receive()
    assert [os.fstat(fd).st_ino for fd in reply.fds] == [inode]
    os.close(reply.fds[0])
    assert (await client.receive()).fds == []


async def test_a_reply_whose_fds_cannot_be_copied_ends_the_connection(
    client: RawClient, device: EchoDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to queue, and we have no room for copies: the client must not wait for ever."""

    def full(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    device.regions[0] = bytearray(1 << 20)
    memory = os.memfd_create("bar")
    device.region_fds[4] = (memory,)
    await client.send(client.request(9, read(0, 0, 1 << 20)))
    await until(lambda: "region_read" in device.names())
    monkeypatch.setattr(os, "dup", full)
    await client.send(client.request(5, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0)))
    await until(lambda: "disconnected" in device.names())
    with pytest.raises(EOFError):  # behind what of the first reply was in the socket
        await client.receive()
    os.close(memory)
    assert "a message cannot be sent: Too many open files; connection closed" in caplog.text


# Hostile clients


@pytest.mark.parametrize(
    "message",
    [
        header(1, 9, 0),
        header(1, 9, 15),
        header(1, 9, 0xFFFFFFFF),
        header(1, 9, MAX_MESSAGE_SIZE + 1),
        header(1, 9, 16, 2),
        header(1, 9, 16, 0xF),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=repr,
)
async def test_a_stream_that_makes_no_sense_is_cut_off_and_the_server_stays(
    client: RawClient, device: EchoDevice, connect: Connect, message: bytes
) -> None:
    await client.send(message)
    await client.no_more()
    client.close()
    following = connect()
    assert (await following.version()).flags == 1
    assert device.names() == ["connected", "disconnected", "connected"]


@pytest.mark.parametrize(
    ("message", "answered"),
    [
        (header(7, 13, 16), True),
        (header(7, 9, 32) + read(4, 0, 1), True),
        (header(7, 13, 16, 0x10), False),
        (header(7, 1, 20, 0x10) + bytes(4), False),
        (header(7, 13, 16, 1), None),
        (header(7, 1, 16), True),
        (header(7, 1, 20) + struct.pack("<HH", 1, 0), True),
        (header(7, 1, 22) + b"\0\0\0\0{\0", True),
    ],
    ids=repr,
)
async def test_a_client_that_does_not_begin_with_a_version(
    qemu_listener: Listener, connect: Connect, device: EchoDevice, message: bytes, answered: bool | None
) -> None:
    client = connect()
    eventfd = os.eventfd(0)
    await client.send(message, [eventfd])
    os.close(eventfd)
    if answered:
        reply = await client.receive()
        assert reply.raw == header(7, reply.command, 16, 0x21, errno.EINVAL)
    if answered is None:  # a reply is nothing to answer; the client may still begin
        assert (await client.version()).flags == 1
    else:
        await client.no_more()
        assert device.calls == []


async def test_a_device_that_cannot_be_used(
    qemu_listener: Listener, connect: Connect, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def connected(client: object) -> None:
        raise RuntimeError("a bug")

    device.connected = connected
    client = connect()
    reply = await client.version()
    assert (reply.flags, reply.error) == (0x21, errno.EIO)
    await client.no_more()
    await until(lambda: device.names() == ["disconnected"])
    assert "a bug" in caplog.text


async def test_a_client_that_goes_in_the_middle_of_a_message(
    client: RawClient, device: EchoDevice, connect: Connect, caplog: pytest.LogCaptureFixture,
    open_fds: Callable[[], int],
) -> None:  # fmt: skip
    before = open_fds()
    eventfd = os.eventfd(0)
    await client.send(client.request(8, bytes(20))[:30], [eventfd])
    os.close(eventfd)
    await until(lambda: open_fds() == before + 1)
    client.close()
    await until(lambda: "disconnected" in device.names())
    assert open_fds() == before - 2
    assert "in the middle of a message" in caplog.text
    assert (await connect().version()).flags == 1


async def test_fds_on_every_message_leak_nothing(
    client: RawClient, device: EchoDevice, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    fds = [os.eventfd(0) for _ in range(16)]
    for command in [*range(1, 20), 0xFFFF]:
        for payload in (b"", bytes(64), struct.pack("<5I", 64, 0x24, 2, 0, 3) + bytes(44)):
            await client.send(client.request(command, payload), fds)
            await client.send(client.request(command, payload, flags=0x10), fds)
            await client.receive()
    await client.send(client.request(9, read(4, 0, 1)), fds)
    await client.receive()
    await client.send(header(77, 11, 16, 1), fds)  # a reply
    await client.send(client.request(13), fds)
    await client.receive()
    assert open_fds() == before + len(fds) + sum(fd is not None for _size, fd in device.maps.values())
    for fd in fds:
        os.close(fd)


async def test_random_bytes_are_survived(
    qemu_listener: Listener, connect: Connect, device: EchoDevice, open_fds: Callable[[], int]
) -> None:
    import random

    source = random.Random(1)
    for number in range(60):
        client = connect()
        await client.version()
        try:
            for _ in range(20):
                payload = source.randbytes(source.choice((0, 4, 8, 16, 20, 24, 32, 64)))
                if source.random() < 0.7 and len(payload) >= 8:  # small numbers get further
                    payload = b"".join(
                        struct.pack("<I", source.choice((0, 1, 2, 4, 16, 20, 24, 32, 0x24, 0x21, 64, 4096, 0xFFFFFFFF)))
                        for _ in range(len(payload) // 4)
                    )
                fds = [os.eventfd(0, os.EFD_NONBLOCK)] * source.choice((0, 0, 1, 2))
                command = source.choice((*range(2, 20), 0xFFFF))
                await client.send(header(number, command, 16 + len(payload), 0) + payload, fds)
                for fd in set(fds):
                    os.close(fd)
                assert (await client.receive()).flags in (1, 0x21)
        finally:
            client.close()
    await until(lambda: device.names().count("disconnected") == 60)


async def test_other_tasks_run_while_a_client_floods(
    client: RawClient, device: EchoDevice, nursery: trio.Nursery
) -> None:
    turns = 0

    async def flood() -> None:
        data = client.request(10, write(4, 0, b"x"), flags=0x10) * 2000
        for _ in range(20):
            await client.send(data)

    nursery.start_soon(flood)
    with trio.fail_after(60):
        while device.names().count("region_write") < 40_000:
            turns += 1
            await trio.lowlevel.checkpoint()
    assert turns > 20
