"""The user netdev with a real passt, fetched from Debian, in a network namespace of its own."""

import logging
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.passt import HOST, ROUTER, passt_namespace, passt_script

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
    """As a guest without an address asks for one, and for name servers."""
    bootp = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + MAC + bytes(202)
    bootp += struct.pack("!I", 0x63825363) + bytes([53, 1, 1, 55, 1, 6, 255]) + bytes(60)
    return datagram("0.0.0.0", "255.255.255.255", 68, 67, bootp)


def datagram(source: str, destination: str, from_port: int, port: int, data: bytes) -> bytes:
    """A frame of the guest's with a UDP packet."""
    udp = struct.pack("!HHHH", from_port, port, 8 + len(data), 0) + data
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0)
    header += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return b"\xff" * 6 + MAC + b"\x08\x00" + header[:10] + struct.pack("!H", 0xFFFF - total) + header[12:] + udp


def fake_passt(folder: Path, commands: str) -> Path:
    """A program that runs these in ``folder`` instead."""
    script = folder / "passt"
    script.write_text(f"#!/bin/sh\ncd {folder}\n{commands}\n")
    script.chmod(0o755)
    return script


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


@pytest.mark.qemu
@pytest.mark.once
@pytest.mark.parametrize("map_gw", [False, True])
async def test_the_hosts_loopback_is_for_those_who_ask(
    map_gw: bool, passt: Path, namespace: NetNamespace, nursery: trio.Nursery
) -> None:
    netdev = UserNetdev(passt=passt, map_gw=map_gw)
    sink = Sink()
    with namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as private:
        private.bind(("127.0.0.1", 0))
        private.setblocking(False)
        namespace.run(netdev.start)
        nursery.start_soon(netdev.run, sink)
        netdev.put(frame_of(dhcp_discover()))
        netdev.put(frame_of(datagram(HOST, ROUTER, 40000, private.getsockname()[1], b"from the guest")))
        if map_gw:
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(private)
            assert private.recv(100) == b"from the guest"
        else:
            netdev.put(frame_of(datagram(HOST, ROUTER, 40000, 67, dhcp_discover()[42:])))  # answered after that
            await sink.wait_frames(2)
            with pytest.raises(BlockingIOError):
                private.recv(100)
    netdev.close()


@pytest.mark.qemu
@pytest.mark.once
@pytest.mark.parametrize(("resolver", "offered"), [("127.0.0.53", "169.254.1.1"), (HOST, HOST)])
async def test_a_name_server_wherever_the_hosts_is(
    resolver: str, offered: str, tmp_path: Path, passt: Path, namespace: NetNamespace, nursery: trio.Nursery
) -> None:
    """Also on its loopback, where systemd-resolved is."""
    (tmp_path / "resolv.conf").write_text(f"nameserver {resolver}\n")
    script = tmp_path / "passt-there"
    mount = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
    script.write_text(f'#!/bin/sh\nexec unshare -m sh -c \'{mount} && exec {passt} "$@"\' sh "$@"\n')
    script.chmod(0o755)
    netdev = UserNetdev(passt=script)
    sink = Sink()
    with namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as answering:
        answering.bind((resolver, 53))
        answering.setblocking(False)
        namespace.run(netdev.start)
        nursery.start_soon(netdev.run, sink)
        netdev.put(frame_of(dhcp_discover()))
        offer = await arrival(sink, 68)
        at = offer.index(bytes([6, 4]), 282) + 2  # among the options
        assert socket.inet_ntoa(offer[at : at + 4]) == offered
        if offered != HOST:  # else it is the guest's own address
            netdev.put(frame_of(datagram(HOST, offered, 40000, 53, b"example.org?")))
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(answering)
            assert answering.recv(100) == b"example.org?"
    netdev.close()


@pytest.mark.once
async def test_passt_can_send_much_before_it_is_read(tmp_path: Path, nursery: trio.Nursery) -> None:
    """It drops what there is no room for. How much the kernel allows another socket says."""
    code = "import socket as s; print(s.socket(fileno=$2).getsockopt(s.SOL_SOCKET, s.SO_SNDBUF))"
    program = f'until [ $1 = --fd ]; do shift; done; {sys.executable} -c "{code}" >size.new; mv size.new size'
    netdev = UserNetdev(passt=fake_passt(tmp_path, program))
    nursery.start_soon(netdev.run, Sink())
    with trio.fail_after(60):
        while not (tmp_path / "size").exists():
            await trio.sleep(0.01)
    netdev.close()
    with socket.socket(socket.AF_UNIX) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        assert int((tmp_path / "size").read_text()) == other.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.once
async def test_what_it_says_is_bounded(tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A guest may be the cause of it: it holds passt not up, fills no disk, and is the device's in the log."""
    complain = 'i=0; while [ $i -lt 20000 ]; do echo "complaint $i" >&2; i=$((i+1)); done; echo all >said'
    netdev = UserNetdev(passt=fake_passt(tmp_path, complain))
    netdev.start()  # and nobody reads
    with trio.fail_after(60):
        while not (tmp_path / "said").exists():
            await trio.sleep(0.01)
        caplog.set_level(logging.INFO)
        nursery.start_soon(netdev.run, Sink())
        while "passt: complaint 1" not in caplog.text:
            await trio.sleep(0.01)
    netdev.close()
    assert "complaint 19999" not in caplog.text
    assert {vars(record)["device"] for record in caplog.records if "complaint" in record.message} == {"netdev"}


@pytest.mark.once
async def test_a_program_that_ends_is_said_with_its_last_words(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    netdev = UserNetdev(passt=fake_passt(tmp_path, "echo no user namespaces here >&2; exit 1"))
    nursery.start_soon(netdev.run, Sink())
    with trio.fail_after(60):
        while "passt has ended, and the network with it: no user namespaces here" not in caplog.text:
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


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_of_the_host_that_is_taken(protocol: str, family: socket.AddressFamily, tmp_path: Path) -> None:
    """By one of both families is enough: the guest is not at that port then for who connects by that one."""
    passt = fake_passt(tmp_path, "exit 1")
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as other:
        if family == socket.AF_INET6:
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        if protocol == "tcp":
            other.listen()
        port = other.getsockname()[1]
        address = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
        for host in ("", address):
            with pytest.raises(DeviceError, match=rf"hostfwd={protocol}:.*:{port}-:22: Address already in use"):
                UserNetdev(passt=passt, hostfwd=[f"{protocol}:{host}:{port}-:22"])
    UserNetdev(passt=passt, hostfwd=[f"{protocol}:{address}:{port}-:22"]).close()


def test_a_port_that_becomes_free(tmp_path: Path) -> None:
    """The passt before has it for as long as it takes to go."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        timer = threading.Timer(0.1, other.close)
        timer.start()
        UserNetdev(passt=fake_passt(tmp_path, "exit 1"), hostfwd=[f"tcp:127.0.0.1:{port}-:22"]).close()
        timer.join()


def test_an_address_of_another_host(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"hostfwd=tcp:192\.0\.2\.77:8022-:22: Cannot assign requested address"):
        UserNetdev(passt=fake_passt(tmp_path, "exit 1"), hostfwd=["tcp:192.0.2.77:8022-:22"])
