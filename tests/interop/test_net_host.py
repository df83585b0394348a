"""A Linux guest on the host's networks: passt (a lease, forwarded ports) and a tap, each in a network namespace."""

import hashlib
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from support.net_namespace import NetNamespace, net_namespace
from support.passt import HOST, ROUTER, passt_namespace, passt_script
from support.vm_devices import MIB, Machine, booted

from vfiouser_virtio import vm
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.backends.net.user import UserNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.virtio import Offer

pytestmark = [pytest.mark.qemu, pytest.mark.variant]

PORT, FORWARDED = 8000, 8022
SIZE = 2 * MIB
TAP_HOST, TAP_GUEST = "198.51.100.1", "198.51.100.2"
TAP_HOST6, TAP_GUEST6 = "fd00:7::1", "fd00:7::2"


def in_namespace(namespace: NetNamespace, family: socket.AddressFamily, address: str) -> trio.SocketListener:
    """A socket that listens there."""

    def listen() -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.bind((address, PORT))
        made.listen()
        return made

    return trio.SocketListener(trio.socket.from_stdlib_socket(namespace.run(listen)))


async def receive_all(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    async for piece in stream:
        received += piece
    return bytes(received)


async def exchange(machine: Machine, listener: trio.SocketListener, destination: str) -> None:
    """A connection of the guest to a port of the host for each direction; what arrives is what was sent."""
    content = os.urandom(SIZE)
    got: list[bytes] = []

    async def serve_one(use: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
        async with await listener.accept() as stream:
            await use(stream)

    async def give(stream: trio.SocketStream) -> None:
        await stream.send_all(content)

    async def take(stream: trio.SocketStream) -> None:
        got.append(await receive_all(stream))

    async with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one, give)
            # From a pipe without an end: the guest keeps its half of the connection open.
            receive = f"[ -p /tmp/open ] || mkfifo /tmp/open; nc {destination} {PORT} <>/tmp/open | sha256sum"
            assert await machine.run(receive) == shown(content)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one, take)
            await machine.run(f"dd if=/dev/urandom of=/tmp/file bs=64k count={SIZE >> 16} 2>/dev/null")
            await machine.run(f"nc {destination} {PORT} </tmp/file")
    assert shown(got[0]) == await machine.run("sha256sum </tmp/file")


def shown(content: bytes) -> str:
    """As sha256sum prints it."""
    return f"{hashlib.sha256(content).hexdigest()}  -"


async def check_passt(machine: Machine, namespace: NetNamespace) -> None:
    """The router's address is the host for the guest, whose own is the host's."""
    assert HOST in await machine.run("timeout 60 udhcpc -i eth0 -q -n -t 10 2>&1")
    assert f"{HOST}/24" in await machine.run("ip addr show dev eth0")
    assert f"default via {ROUTER}" in await machine.run("ip route")
    await exchange(machine, in_namespace(namespace, socket.AF_INET, "127.0.0.1"), ROUTER)

    await machine.run("httpd -p 22 -h /tmp")
    caller = trio.socket.from_stdlib_socket(namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)))
    await caller.connect(("127.0.0.1", FORWARDED))
    async with trio.SocketStream(caller) as stream:
        await stream.send_all(b"GET /file HTTP/1.0\r\n\r\n")
        _, _, content = (await receive_all(stream)).partition(b"\r\n\r\n")
    assert shown(content) == await machine.run("sha256sum </tmp/file")


async def check_tap(machine: Machine, namespace: NetNamespace, device: Net) -> None:
    """By IPv4 and IPv6, and what crosses are segments that nobody has cut."""
    await machine.run(
        "echo 0 >/proc/sys/net/ipv6/conf/eth1/accept_dad && ip link set eth1 up && "
        f"ip addr add {TAP_GUEST}/24 dev eth1 && ip addr add {TAP_GUEST6}/64 dev eth1"
    )
    await machine.run(f"ping -c 2 {TAP_HOST} && ping6 -c 2 {TAP_HOST6}")
    for family, address in ((socket.AF_INET, TAP_HOST), (socket.AF_INET6, TAP_HOST6)):
        sent, received = (device.transmitter.queues[0], device.receiver.queues[0])
        before = sent.gso_packets_noseg, received.gso_packets
        await exchange(machine, in_namespace(namespace, family, address), address)
        assert sent.gso_packets_noseg > before[0]
        assert received.gso_packets > before[1]
        assert sent.gso_segments == 0, "one of them was cut here"


async def test_a_lease_forwarded_ports_and_a_tap(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with passt_namespace() as inside, net_namespace() as outside:
        user = UserNetdev(passt=passt_script(tmp_path), hostfwd=[f"tcp:127.0.0.1:{FORWARDED}-:22"], map_gw=True)
        inside.run(user.start)
        tap = outside.run(partial(TapNetdev, ifname="tap7"))
        outside.ip(f"addr add {TAP_HOST}/24 dev tap7")
        outside.ip(f"addr add {TAP_HOST6}/64 dev tap7 nodad")
        devices = {"user": Net(netdev=user), "tap": (on_tap := Net(netdev=tap))}
        async with booted(qemu, guest_image, devices, offer=Offer(packed=True)) as machine:
            with trio.fail_after(400):
                await check_passt(machine, inside)
                await check_tap(machine, outside, on_tap)
                await machine.check_quiet(caplog)
        assert "tap7" not in outside.ip("link"), "the interface was left behind"
