"""The boot netdev as users ask for it, and with a guest that sends anything."""

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.boot_client import (
    CLIENT,
    DISCOVER,
    INFORM,
    MAC,
    REQUEST,
    SERVER,
    TFTP,
    ack,
    dhcp,
    download,
    ethernet,
    ipv4,
    packed,
    rrq,
    udp,
)
from support.net_packets import internet_checksum
from support.net_sink import Sink

from vfiouser_virtio.backends.net.boot.netdev import BootNetdev
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev, join
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.errors import ConfigError, DeviceError

ECHO = struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0)
ARP = bytes.fromhex("0001 0800 06 04 0001") + MAC + packed(CLIENT) + bytes(6) + packed(SERVER)


def test_what_a_user_says_wrong(tmp_path: Path) -> None:
    (tmp_path / "kernel").touch()
    boot: dict[str, Any] = {"tftp": tmp_path}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"net": "10.0.2.0"}, "net=10.0.2.0: expected an IPv4 network such as 10.0.2.0/24"),
        ({"net": "fec0::/64"}, "net=fec0::/64: expected an IPv4 network"),
        ({"net": "10.0.2.0/31"}, "net=10.0.2.0/31: expected an IPv4 network .* of 8 to 30 bits"),
        ({"net": "10.0.2.0/30"}, "dhcpstart=ADDRESS is needed: 10.0.2.0/30 has fewer than 15 hosts' addresses"),
        ({"net": "255.255.255.248/29"}, "dhcpstart=ADDRESS is needed: 255.255.255.248/29 has fewer than 15"),
        ({"dhcpstart": "10.0.2.254", "host": "10.0.2.254"}, "dhcpstart=10.0.2.254: no address from there on is left"),
        ({"host": "10.0.3.2"}, "host=10.0.3.2 is no host's address in 10.0.2.0/24"),
        ({"host": "server"}, "host=server: expected an IPv4 address of 10.0.2.0/24"),
        ({"dhcpstart": "10.0.2.255"}, "dhcpstart=10.0.2.255 is no host's address in"),
        ({"hostname": "a b"}, "hostname=a b: expected up to 63 letters"),
        ({"hostname": "x" * 64}, "expected up to 63 letters"),
        ({"bootfile": "kernel"}, "bootfile=kernel is a file of the folder tftp=DIR, which is missing"),
        (boot | {"bootfile": "x" * 128}, "expected a name of up to 127 bytes"),
        (boot | {"bootfile": ""}, "expected a name of up to 127 bytes"),
        (boot | {"bootfile": "kernel\0x"}, "expected a name of up to 127 bytes"),
        (boot | {"bootfile": "missing"}, "bootfile=missing: No such file or directory: it has to be in tftp="),
        (boot | {"bootfile": "../x"}, "bootfile=../x: it leads out of the folder, or is no regular file: it has to"),
        ({"tftp": tmp_path / "missing"}, "tftp=.*: No such file or directory"),
    ]
    for options, mistake in mistakes:
        with pytest.raises(ConfigError, match=mistake):
            BootNetdev(**options)
    with pytest.raises(DeviceError):
        BootNetdev(**boot, bootfile="missing")
    BootNetdev(**boot, bootfile="/kernel", net="10.1.0.0/255.255.0.0", host="10.1.9.9", dhcpstart="10.1.9.9").close()


async def test_its_link_is_up_and_all_offloads_are_done_before() -> None:
    netdev = BootNetdev()
    assert netdev.link
    assert netdev.does == Does(0)
    assert netdev.describe() == "boot 10.0.2.0/24, server 10.0.2.2"


async def test_frames_that_come_before_it_runs_wait() -> None:
    netdev, sink = BootNetdev(), Sink()
    for times in range(1, 3):
        assert not netdev.put(frame_of(udp(b"", 67)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(netdev.run, sink)
            with trio.fail_after(60):
                await netdev.wait_room()
            assert netdev.put(frame_of(ethernet(ARP, ethertype=0x0806)))
            await sink.wait_frame(times - 1)
            nursery.cancel_scope.cancel()
        assert netdev.counters.tx_packets == times
        assert netdev.counters.tx_dropped == 0


def mutated(chance: random.Random, frame: bytes) -> bytes:
    """A frame with lies in it, whose checksums are sometimes right all the same."""
    data = bytearray(frame)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = bytes((chance.choice((0, 1, 4, 0x7F, 0x80, 0xFF, chance.randrange(256))),))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[at : at + chance.randrange(200)]
            case 3:
                data += chance.randbytes(chance.randrange(2000))
    if len(data) >= 42 and chance.random() < 0.8:
        data[24:26] = b"\0\0"
        data[24:26] = internet_checksum(bytes(data[14:34])).to_bytes(2, "big")
        if data[23] == 17 and chance.random() < 0.8:
            data[40:42] = b"\0\0"
    return bytes(data)


async def test_whatever_a_guest_sends_is_answered_or_counted(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, long_run: bool
) -> None:
    (tmp_path / "file").write_bytes(bytes(3000))
    netdev, sink = BootNetdev(tftp=tmp_path, bootfile="file", hostname="guest"), Sink()
    nursery.start_soon(netdev.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    frames = [
        ethernet(ARP, ethertype=0x0806),
        ethernet(ipv4(ECHO, 1)),
        dhcp(DISCOVER, {60: b"PXEClient", 55: bytes(20), 97: bytes(17), 175: b"\1\1\1"}),
        dhcp(REQUEST, {50: packed(CLIENT), 54: packed(SERVER)}),
        dhcp(INFORM, ciaddr=CLIENT),
        udp(rrq("file", {"blksize": 100, "windowsize": 3, "tsize": 0}), TFTP),
        udp(ack(0), 49152),
        udp(b"\0\5\0\0no\0", 49153),
    ]
    chance = random.Random(11)
    count = 20_000 if long_run else 4000
    for turn in range(count):
        data = mutated(chance, chance.choice(frames))
        pieces = [memoryview(data)[:20], memoryview(data)[20:]] if turn % 3 else [memoryview(data)]
        assert netdev.put(Frame(pieces, len(data)))
        if turn % 50 == 0:
            await trio.lowlevel.checkpoint()
    counters = netdev.counters
    assert counters.tx_packets == count
    assert 0 < counters.tx_dropped < count
    assert len(caplog.records) < 20
    assert len(netdev.leases) <= 256
    # And it works as before; what it had begun for others is none of this client's.
    sent = len(sink.frames)

    async def receive() -> bytes:
        nonlocal sent
        while True:
            sent += 1
            frame = await sink.wait_frame(sent - 1)
            if len(frame) > 42 and frame[36:38] == (7777).to_bytes(2, "big"):
                return frame

    with trio.fail_after(60):
        data, _ = await download(lambda frame: netdev.put(frame_of(frame)), receive, "file", port=7777)
    assert data == bytes(3000)


async def test_several_devices_on_a_hub_boot_from_one(nursery: trio.Nursery) -> None:
    netdev = BootNetdev()
    ports = [HubNetdev(hub="boot") for _ in range(3)]
    sinks = [Sink(), Sink()]
    nursery.start_soon(join, ports[2], netdev)
    for port, sink in zip(ports, sinks, strict=False):
        nursery.start_soon(port.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    for number, (port, sink) in enumerate(zip(ports, sinks, strict=False)):
        port.put(frame_of(dhcp(DISCOVER, mac=bytes((0x52, 0, 0, 0, 0, number)))))
        offer = (await sink.wait_frames(1 if number == 0 else 2))[-1]
        assert offer[58:62] == packed(f"10.0.2.{15 + number}")
