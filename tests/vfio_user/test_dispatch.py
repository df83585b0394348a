"""Every command and its argument checks, on `dispatch` itself: the call it makes, the answer, the fds it closes."""

import errno
import os
import struct
from collections.abc import Callable

import pytest
from support.dispatching import Send, is_open, refused
from support.echo_device import EchoDevice

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols import vfio_user as vu
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.vfio_device import Hold, IrqSetFlags
from vfiouser_virtio.vfio_user.server.dispatch import Response, dispatch
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message

# Every command


def test_every_command_of_the_protocol_has_an_answer(send: Send) -> None:
    for command in Command:
        number = 0
        try:
            send(command, bytes(64))
        except PeerError as error:
            number = error.errno
        assert number in (0, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY), command


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (Command.VERSION, errno.EINVAL),
        (Command.DMA_READ, errno.EINVAL),
        (Command.DMA_WRITE, errno.EINVAL),
        (Command.DIRTY_PAGES, errno.EOPNOTSUPP),
        (Command.DEVICE_FEATURE, errno.ENOTTY),
        (Command.MIG_DATA_READ, errno.EOPNOTSUPP),
        (Command.MIG_DATA_WRITE, errno.EOPNOTSUPP),
        (0, errno.ENOSYS),
        (19, errno.ENOSYS),
        (0xFFFF, errno.ENOSYS),
    ],
)
def test_what_is_not_offered(send: Send, command: int, number: int) -> None:
    refused(send, number, command, bytes(64))


@pytest.mark.parametrize("command", [*range(1, 19), 0x77])
def test_fds_that_nobody_expects_are_closed(
    send: Send, device: EchoDevice, command: int, eventfds: Callable[[int], tuple[int, ...]]
) -> None:
    fds = eventfds(3)
    try:
        send(command, bytes(64), fds)
    except PeerError:
        pass
    assert not any(map(is_open, fds))


@pytest.mark.parametrize("command", [2, 3, 4, 5, 6, 7, 8, 9, 10, 15])
def test_a_payload_that_is_too_short(send: Send, device: EchoDevice, command: int) -> None:
    size = {2: 32, 3: 24, 4: 16, 5: 32, 6: 16, 7: 16, 8: 20, 9: 16, 10: 16, 15: 8}[command]
    for length in range(size):
        assert f"0x{length:x} bytes" in refused(send, errno.EINVAL, command, bytes(length), write_multiple=True)
    assert device.calls == []


@pytest.mark.parametrize(("command", "argsz"), [(2, 32), (4, 16), (5, 32), (6, 16), (7, 16), (8, 20)])
def test_an_argsz_that_is_too_small(send: Send, device: EchoDevice, command: int, argsz: int) -> None:
    for short in (0, 1, argsz - 1):
        text = refused(send, errno.EINVAL, command, struct.pack("<I", short) + bytes(60))
        assert f"argsz 0x{short:x} is below 0x{argsz:x}" in text
    assert device.calls == []


def test_too_many_fds(send: Send, device: EchoDevice, eventfds: Callable[[int], tuple[int, ...]]) -> None:
    refused(send, errno.EINVAL, Command.DEVICE_RESET, b"", eventfds(17))
    assert device.calls == []


def test_fds_that_were_lost(device: EchoDevice, eventfds: Callable[[int], tuple[int, ...]]) -> None:
    (fd,) = eventfds(1)
    message = Message(1, Command.DMA_MAP, 0, 0, bytes(32), [fd], fds_lost=True)
    with pytest.raises(PeerError, match="not all") as caught:
        dispatch(device, message, Negotiated())
    assert caught.value.errno == errno.EMFILE
    assert not is_open(fd)


# DMA


def dma_map(address: int = 0x1000, size: int = 0x2000, flags: int = 3, offset: int = 0) -> bytes:
    built: bytes = vu.DMA_MAP.build({"argsz": 32, "flags": flags, "offset": offset, "address": address, "size": size})
    return built


def test_dma_map_without_fd(send: Send, device: EchoDevice) -> None:
    assert send(Command.DMA_MAP, dma_map(0xFFFC0000, 0x40000, 1)) == Response()
    assert device.calls == [("dma_map", 0xFFFC0000, 0x40000, True, False, False, 0)]


def test_dma_map_hands_its_fd_over(send: Send, device: EchoDevice, eventfds: Callable[[int], tuple[int, ...]]) -> None:
    (fd,) = eventfds(1)
    send(Command.DMA_MAP, dma_map(0x100000000, 0x80000000, 3, 0xC0000000), (fd,))
    assert device.calls == [("dma_map", 0x100000000, 0x80000000, True, True, True, 0xC0000000)]
    assert device.maps[0x100000000] == (0x80000000, fd)
    assert is_open(fd)


def test_dma_map_up_to_the_very_end(send: Send, device: EchoDevice) -> None:
    send(Command.DMA_MAP, dma_map(0xFFFFFFFFFFFFF000, 0x1000))
    assert device.names() == ["dma_map"]


def test_an_error_of_the_function_passes_through(
    send: Send, device: EchoDevice, eventfds: Callable[[int], tuple[int, ...]]
) -> None:
    send(Command.DMA_MAP, dma_map())
    refused(send, errno.EEXIST, Command.DMA_MAP, dma_map(), eventfds(1))


@pytest.mark.parametrize(
    "payload",
    [
        dma_map(size=0),
        dma_map(0xFFFFFFFFFFFFF000, 0x1001),
        dma_map(0, 1 << 63, offset=1),
        dma_map(offset=(1 << 64) - 1),
        dma_map(flags=4),
        dma_map(flags=0x80000003),
    ],
)
def test_dma_map_refused(
    send: Send, device: EchoDevice, payload: bytes, eventfds: Callable[[int], tuple[int, ...]]
) -> None:
    refused(send, errno.EINVAL, Command.DMA_MAP, payload, eventfds(1))
    assert device.calls == []


def test_dma_map_with_two_fds(send: Send, device: EchoDevice, eventfds: Callable[[int], tuple[int, ...]]) -> None:
    refused(send, errno.EINVAL, Command.DMA_MAP, dma_map(), eventfds(2))
    assert device.calls == []


def unmap(address: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    built: bytes = vu.DMA_UNMAP.build({"argsz": argsz, "flags": flags, "address": address, "size": size})
    return built


def test_dma_unmap_echoes_its_struct(send: Send, device: EchoDevice) -> None:
    payload = unmap(0xFEF00000, 0xFFFFFFFF01100000)  # QEMU with a vIOMMU: up to the very end, never mapped
    assert send(Command.DMA_UNMAP, payload) == Response(payload)
    assert device.calls == [("dma_unmap", 0xFEF00000, 0xFFFFFFFF01100000)]


def test_dma_unmap_answers_no_more_than_argsz(send: Send) -> None:
    assert send(Command.DMA_UNMAP, unmap(0, 0x1000, argsz=0)).payload == b""
    assert len(send(Command.DMA_UNMAP, unmap(0, 0x1000, argsz=4096) + bytes(500)).payload) == 24


def test_dma_unmap_all(send: Send, device: EchoDevice) -> None:
    assert send(Command.DMA_UNMAP, unmap(0, 0, vu.DmaUnmapFlags.ALL)).payload == unmap(0, 0, 2)
    assert device.calls == [("dma_unmap", 0, 1 << 64)]


def test_dma_unmap_returns_the_hold(send: Send, device: EchoDevice) -> None:
    device.hold = hold = Hold()
    assert send(Command.DMA_UNMAP, unmap(0, 0x1000)).hold is hold


@pytest.mark.parametrize(
    ("payload", "number"),
    [
        (unmap(0x1000, 0), errno.EINVAL),
        (unmap(1, (1 << 64) - 1 + 0, 2), errno.EINVAL),
        (unmap(0x2000, (1 << 64) - 1), errno.EINVAL),
        (unmap(0, 0x1000, 1), errno.EOPNOTSUPP),
        (unmap(0, 0x1000, 4), errno.EINVAL),
        (unmap(0, 0x1000, 2), errno.EINVAL),
        (unmap(0x1000, 0, 2), errno.EINVAL),
    ],
)
def test_dma_unmap_refused(send: Send, device: EchoDevice, payload: bytes, number: int) -> None:
    refused(send, number, Command.DMA_UNMAP, payload)
    assert device.calls == []


# Interrupts


def set_irqs(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<5I", 20 + len(data), flags, index, start, count) + data


@pytest.mark.parametrize("action", [0x08, 0x10, 0x20])
def test_set_irqs_in_every_form(
    send: Send, device: EchoDevice, action: int, eventfds: Callable[[int], tuple[int, ...]]
) -> None:
    assert send(8, set_irqs(action | 1, 2, 3, 2)) == Response()
    send(8, set_irqs(action | 2, 2, 3, 2, b"\1\0"))
    send(8, set_irqs(action | 4, 2, 3, 2))
    fds = eventfds(2)
    send(8, set_irqs(action | 4, 2, 3, 2), fds)
    none, boolean, eventfd = (IrqSetFlags(action | data) for data in (1, 2, 4))
    assert device.calls == [
        ("set_irqs", 2, none, 3, 2, b"", 0),
        ("set_irqs", 2, boolean, 3, 2, b"\1\0", 0),
        ("set_irqs", 2, eventfd, 3, 2, b"", 0),
        ("set_irqs", 2, eventfd, 3, 2, b"", 2),
    ]
    assert device.irqs == {(2, IrqSetFlags(action), 3): fds[0], (2, IrqSetFlags(action), 4): fds[1]}
    assert all(map(is_open, fds))


def test_set_irqs_disables_an_index(send: Send, device: EchoDevice) -> None:
    send(8, set_irqs(0x21, 0, 0, 0))
    assert device.calls == [("set_irqs", 0, IrqSetFlags(0x21), 0, 0, b"", 0)]


def test_set_irqs_takes_the_last_vector_and_more_data_than_needed(send: Send, device: EchoDevice) -> None:
    send(8, set_irqs(0x22, 2, 31, 1, b"\1\1\1\1"))
    assert device.calls == [("set_irqs", 2, IrqSetFlags(0x22), 31, 1, b"\1", 0)]


@pytest.mark.parametrize(
    "payload",
    [
        set_irqs(0, 2, 0, 1),
        set_irqs(0x20, 2, 0, 1),
        set_irqs(0x04, 2, 0, 1),
        set_irqs(0x26, 2, 0, 1),
        set_irqs(0x34, 2, 0, 1),
        set_irqs(0x64, 2, 0, 1),
        set_irqs(0x80000024, 2, 0, 1),
        set_irqs(0x21, 2, 1, 0),
        set_irqs(0x09, 2, 0, 0),
        set_irqs(0x22, 2, 0, 0),
        set_irqs(0x24, 2, 0, 0),
        set_irqs(0x24, 2, 32, 1),
        set_irqs(0x24, 2, 0, 33),
        set_irqs(0x24, 2, 0xFFFFFFFF, 1),
        set_irqs(0x21, 2, 0xFFFFFFFF, 0xFFFFFFFF),
        set_irqs(0x22, 2, 0, 3, b"\1\1"),
        set_irqs(0x24, 9, 0, 1),
        set_irqs(0x21, 9, 0, 0),
        set_irqs(0x24, 2, 0, 2),
    ],
    ids=lambda payload: payload.hex(),
)
def test_set_irqs_refused(
    send: Send, device: EchoDevice, payload: bytes, eventfds: Callable[[int], tuple[int, ...]]
) -> None:
    refused(send, errno.EINVAL, 8, payload, eventfds(1))  # one fd: too few for the last of them
    assert device.calls == []


def test_only_eventfds_are_signalled(send: Send, device: EchoDevice) -> None:
    reading, writing = os.pipe()
    refused(send, errno.EINVAL, 8, set_irqs(0x24, 2, 0, 2), (reading, writing))
    assert device.calls == []
