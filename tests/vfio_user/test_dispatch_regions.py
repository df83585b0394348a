"""Information about a device and its regions, and accesses to them, on `dispatch` itself."""

import errno
import struct

import pytest
from support.dispatching import Send, refused
from support.echo_device import EchoDevice

from vfiouser_virtio.protocols import vfio_user as vu
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.vfio_device import Hold, IoEventFd
from vfiouser_virtio.vfio_user.server.dispatch import Response

# Information


@pytest.mark.parametrize("argsz", [16, 32, 0xFFFFFFFF])  # rust-vmm counts the header
def test_device_get_info(send: Send, argsz: int) -> None:
    answer = send(Command.DEVICE_GET_INFO, struct.pack("<4I", argsz, 0, 0, 0))
    assert answer == Response(struct.pack("<4I", 16, 3, 9, 5))


def region_info(index: int, argsz: int = 32) -> bytes:
    return struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)


def test_region_info(send: Send) -> None:
    assert send(5, region_info(7)).payload == struct.pack("<IIIIQQ", 32, 3, 7, 0, 256, 0)
    assert send(5, region_info(8)).payload == struct.pack("<IIIIQQ", 32, 0, 8, 0, 0, 0)
    refused(send, errno.EINVAL, 5, region_info(9))
    refused(send, errno.EINVAL, 5, region_info(0xFFFFFFFF))


def test_region_info_takes_spdks_long_request(send: Send) -> None:
    payload = region_info(4, 0xFE0).ljust(4064, b"\0")
    assert send(5, payload).payload == struct.pack("<IIIIQQ", 32, 3, 4, 0, 0x4000, 0)


def sparse(*areas: tuple[int, int]) -> bytes:
    built: bytes = vu.SPARSE_MMAP.build({"areas": [{"offset": offset, "size": size} for offset, size in areas]})
    return built


def test_region_capabilities_in_two_rounds(send: Send, device: EchoDevice) -> None:
    device.capabilities[4] = ((vu.RegionInfoCap.SPARSE_MMAP, 1, sparse((0, 0x1000), (0x2000, 0x1000))),)
    device.region_fds[4] = (0,)
    first = send(5, region_info(4))
    assert first.payload == struct.pack("<IIIIQQ", 80, 0xF, 4, 32, 0x4000, 0)
    for argsz in (33, 79):
        assert send(5, region_info(4, argsz)) == first
    second = send(5, region_info(4, 80))
    assert second.payload == first.payload + struct.pack("<HHIIIQQQQ", 1, 1, 0, 2, 0, 0, 0x1000, 0x2000, 0x1000)
    assert second.fds == (0,)
    parsed = vu.COMMANDS[Command.DEVICE_GET_REGION_INFO].reply.parse(second.payload)
    assert parsed.info.argsz == len(second.payload)
    assert vu.SPARSE_MMAP.parse(parsed.capabilities[8:]).areas[1].offset == 0x2000


def test_a_client_that_takes_no_fds_is_not_offered_to_map(send: Send, device: EchoDevice) -> None:
    device.capabilities[4] = ((vu.RegionInfoCap.SPARSE_MMAP, 1, sparse((0, 0x1000))),)
    device.region_fds[4] = (0,)
    answer = send(5, region_info(4, 4096), max_msg_fds=0)
    assert answer.payload == struct.pack("<IIIIQQ", 32, 3, 4, 0, 0x4000, 0)
    assert answer.fds == ()


def test_a_chain_of_capabilities(send: Send, device: EchoDevice) -> None:
    device.capabilities[4] = ((3, 1, b""), (99, 2, b"abc"), (1, 1, sparse((0, 0x1000))))
    payload = send(5, region_info(4, 4096)).payload
    found, offset = [], struct.unpack_from("<I", payload, 12)[0]
    while offset:
        assert offset % 8 == 0
        identity, version, following = struct.unpack_from("<HHI", payload, offset)
        found.append((identity, version, payload[offset + 8 : following or len(payload)]))
        offset = following
    assert found == [(3, 1, b""), (99, 2, b"abc\0\0\0\0\0"), (1, 1, sparse((0, 0x1000)))]


def io_fds(index: int, argsz: int = 4096, flags: int = 0) -> bytes:
    return struct.pack("<4I", argsz, flags, index, 0)


def test_region_io_fds(send: Send, device: EchoDevice) -> None:
    device.io = [
        IoEventFd(0x3000, 2, 50),
        IoEventFd(0x3004, 2, 51, vu.IoEventFdFlags.DATAMATCH, 7),
        IoEventFd(0x3008, 0, 50),
    ]
    answer = send(6, io_fds(4))
    assert answer.fds == [50, 51]
    parsed = vu.COMMANDS[Command.DEVICE_GET_REGION_IO_FDS].reply.parse(answer.payload)
    assert (parsed.info.argsz, parsed.info.flags, parsed.info.index, parsed.info.count) == (16 + 3 * 40, 0, 4, 3)
    found = [(sub.offset, sub.size, sub.fd_index, sub.type, sub.flags, sub.datamatch) for sub in parsed.sub_regions]
    assert found == [(0x3000, 2, 0, 0, 0, 0), (0x3004, 2, 1, 0, 1, 7), (0x3008, 0, 0, 0, 0, 0)]


def test_region_io_fds_that_do_not_fit(send: Send, device: EchoDevice) -> None:
    device.io = [IoEventFd(0x3000 + 4 * number, 2, 50 + number) for number in range(8)]
    assert send(6, io_fds(4, 16 + 8 * 40 - 1)) == Response(struct.pack("<4I", 16 + 8 * 40, 0, 4, 0))
    assert send(6, io_fds(0)) == Response(struct.pack("<4I", 16, 0, 0, 0), [])
    answer = send(6, io_fds(4), max_msg_fds=3)  # the other queues stay on messages
    assert answer.fds == [50, 51, 52]
    assert struct.unpack_from("<4I", answer.payload) == (16 + 3 * 40, 0, 4, 3)
    assert send(6, io_fds(4), max_msg_fds=0) == Response(struct.pack("<4I", 16, 0, 4, 0), [])
    refused(send, errno.EINVAL, 6, io_fds(4, flags=1))


def test_irq_info(send: Send) -> None:
    assert send(7, struct.pack("<4I", 16, 0, 2, 0)) == Response(struct.pack("<4I", 16, 1, 2, 32))
    refused(send, errno.EINVAL, 7, struct.pack("<4I", 16, 0, 3, 0))
    refused(send, errno.EINVAL, 7, struct.pack("<4I", 16, 0, 0xFFFFFFFF, 0))


# Region accesses


def access(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QII", offset, region, count) + data


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 256])
def test_region_read_and_write(send: Send, device: EchoDevice, count: int) -> None:
    data = bytes(range(count % 256)) or bytes(count)
    assert send(10, access(4, 0x123, count, data)) == Response(access(4, 0x123, count))
    assert send(9, access(4, 0x123, count)) == Response(access(4, 0x123, count, data))


def test_region_write_ignores_what_is_behind_the_data(send: Send, device: EchoDevice) -> None:
    send(10, access(4, 0, 2, b"abcdef"))
    assert device.calls == [("region_write", 4, 0, b"ab")]


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (9, access(4, 0, 0)),
        (9, access(4, 0, (1 << 20) + 1)),
        (9, access(4, 0, 0xFFFFFFFF)),
        (9, access(4, (1 << 64) - 1, 2)),
        (10, access(4, 0, 0)),
        (10, access(4, 0, 4, b"abc")),
        (10, access(4, 0, 0xFFFFFFFF, b"abc")),
        (10, access(4, (1 << 64) - 1, 2, b"ab")),
    ],
)
def test_region_access_refused(send: Send, device: EchoDevice, command: int, payload: bytes) -> None:
    refused(send, errno.EINVAL, command, payload)
    assert device.calls == []


@pytest.mark.parametrize("payload", [access(4, 0x3FFF, 2), access(99, 0, 1), access(0xFFFFFFFF, 0, 1)])
def test_region_access_that_the_function_refuses(send: Send, payload: bytes) -> None:
    refused(send, errno.EINVAL, 9, payload)


def test_a_wrong_length_is_not_the_clients_fault(send: Send, device: EchoDevice) -> None:
    device.region_read = lambda index, offset, count: b"abc"
    with pytest.raises(AssertionError, match="0x3 bytes instead of 0x4"):
        send(9, access(4, 0, 4))


def multi(*writes: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    return struct.pack("<Q", len(writes) if count is None else count) + b"".join(
        struct.pack("<QII8s", offset, region, size, data) for region, offset, size, data in writes
    )


def test_region_write_multi(send: Send, device: EchoDevice) -> None:
    payload = multi((4, 0, 1, b"abc"), (4, 0x10, 8, b"abcdefgh"), (0, 0x20, 2, b"xy"))
    assert send(15, payload, write_multiple=True) == Response(struct.pack("<Q", 3))
    assert device.calls == [
        ("region_write", 4, 0, b"a"),
        ("region_write", 4, 0x10, b"abcdefgh"),
        ("region_write", 0, 0x20, b"xy"),
    ]
    assert send(15, multi(), write_multiple=True) == Response(struct.pack("<Q", 0))


def test_region_write_multi_does_the_rest_when_one_fails(send: Send, device: EchoDevice) -> None:
    refused(send, errno.EINVAL, 15, multi((4, 0, 1, b"a"), (9, 0, 1, b"b"), (4, 1, 1, b"c")), write_multiple=True)
    assert device.regions[4][:2] == b"ac"


@pytest.mark.parametrize(
    "payload",
    [
        multi((4, 0, 0, b"")),
        multi((4, 0, 1, b"a"), (4, 0, 9, b"")),
        multi((4, (1 << 64) - 1, 2, b"")),
        multi((4, 0, 1, b"a"), count=2),
        multi((4, 0, 1, b"a"), count=(1 << 64) - 1),
        multi((4, 0, 1, b"a"))[:-1],
    ],
)
def test_region_write_multi_refused(send: Send, device: EchoDevice, payload: bytes) -> None:
    refused(send, errno.EINVAL, 15, payload, write_multiple=True)
    assert device.calls == []


def test_region_write_multi_only_if_negotiated(send: Send, device: EchoDevice) -> None:
    refused(send, errno.EOPNOTSUPP, 15, multi((4, 0, 1, b"a")))
    assert device.calls == []


def test_reset(send: Send, device: EchoDevice) -> None:
    assert send(13) == Response()
    device.hold = hold = Hold()
    assert send(13, b"whatever") == Response(hold=hold)
    assert device.names() == ["reset", "reset"]
