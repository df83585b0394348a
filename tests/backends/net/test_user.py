"""The user netdev with a real passt, fetched from Debian, in a network namespace of its own."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.passt import HOST, passt_namespace, passt_script

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.user import UserNetdev
from vfiouser_virtio.errors import ConfigError, DeviceError

MAC = bytes.fromhex("525400123456")


@pytest.fixture
def passt(tmp_path: Path) -> Path:
    return passt_script(tmp_path)


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    with passt_namespace() as made:
        yield made


def dhcp_discover() -> bytes:
    """As a guest without an address asks for one."""
    bootp = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + MAC + bytes(202)
    bootp += struct.pack("!I", 0x63825363) + bytes([53, 1, 1, 255]) + bytes(60)
    udp = struct.pack("!HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    header = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0, 0, 0xFFFFFFFF)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return b"\xff" * 6 + MAC + b"\x08\x00" + header[:10] + struct.pack("!H", 0xFFFF - total) + header[12:] + udp


async def arrival(sink: Sink, port: int) -> bytes:
    """The first UDP or TCP packet to this port of the guest."""
    seen = 0
    while True:
        await sink.wait_frames(seen + 1)
        data = sink.frames[seen].tobytes()
        if data[12:14] == b"\x08\x00" and struct.unpack_from("!H", data, 36) == (port,):
            return data
        seen += 1


@pytest.mark.qemu  # as what fetches programs
@pytest.mark.once
async def test_a_lease_and_a_forwarded_port(passt: Path, namespace: NetNamespace, nursery: trio.Nursery) -> None:
    netdev = UserNetdev(passt=passt, hostfwd=["tcp:127.0.0.1:8022-:22", "udp::8053-:53"])
    sink = Sink()
    namespace.run(netdev.start)
    nursery.start_soon(netdev.run, sink)
    assert netdev.link
    assert netdev.put(frame_of(dhcp_discover()))
    offer = await arrival(sink, 68)
    assert socket.inet_ntoa(offer[58:62]) == HOST  # yiaddr
    host = namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with host:
        host.sendto(b"question", ("127.0.0.1", 8053))
        # passt asks who has the guest's address before it sends anything there: it has seen the guest's MAC.
        assert (await arrival(sink, 53)).endswith(b"question")
    caller = namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with caller:
        caller.setblocking(False)
        with pytest.raises(BlockingIOError):
            caller.connect(("127.0.0.1", 8022))
        assert await arrival(sink, 22)
    netdev.close()


@pytest.mark.once
async def test_a_program_that_ends_is_said_with_its_last_words(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "passt"
    script.write_text("#!/bin/sh\necho no user namespaces here >&2\nexit 1\n")
    script.chmod(0o755)
    netdev = UserNetdev(passt=script)
    nursery.start_soon(netdev.run, Sink())
    with trio.fail_after(60):
        while "no user namespaces here" not in caplog.text:
            await trio.sleep(0.01)
    assert not netdev.link
    netdev.close()


def test_where_there_is_no_passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="needs the program passt: apt install passt"):
        UserNetdev()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8022-:22", "expected tcp::8022-:22"),
        ("tcp::8022-10.0.2.15:22", "the guest has one address"),
        ("tcp::0-:22", "a port is 1 to 65535"),
        ("sctp::1-:2", "expected"),
    ],
)
def test_forwardings_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UserNetdev(hostfwd=[text])
