"""The tap netdev on real interfaces, each in a network namespace of its own."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest
import trio
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.net_tap import ETHERNET, GUEST, GUEST_MAC, HEADERS, HOST, IP_HEADER, PORT, UDP_HEADER, new_tap

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, Does
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.driver import NEEDS_RESET, running

UDP_SEGMENT = 103


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[TapNetdev]:
    made = new_tap(namespace)
    yield made
    made.close()


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def udp(namespace: NetNamespace, payload: bytes) -> tuple[bytes, Offload]:
    """From the guest to the host, with a checksum that is to be completed."""
    host_mac = bytes.fromhex(namespace.ip("-o link show tap7").split("link/ether ")[1][:17].replace(":", ""))
    length = UDP_HEADER + len(payload)
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, IP_HEADER + length, 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    ip = ip[:10] + struct.pack(">H", 0xFFFF - checksum(ip)) + ip[12:]
    pseudo = checksum(addresses + struct.pack(">HH", socket.IPPROTO_UDP, length))
    data = host_mac + GUEST_MAC + b"\x08\x00" + ip + struct.pack(">HHHH", PORT, PORT, length, pseudo) + payload
    return data, Offload(HdrFlags.NEEDS_CSUM, GsoType.NONE, HEADERS, 0, ETHERNET + IP_HEADER, 6)


async def first_udp(sink: Sink) -> tuple[bytes, Offload | None]:
    """The first UDP frame: the host says other things as well, such as router solicitations."""
    seen = 0
    while True:
        await sink.wait_frames(seen + 1)
        frame = sink.frames[seen]
        data = frame.tobytes()
        if data[12:14] == b"\x08\x00" and data[23] == socket.IPPROTO_UDP:
            return data, frame.offload
        seen += 1


def host_socket(namespace: NetNamespace) -> socket.socket:
    made = namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.bind((HOST, PORT))
    made.settimeout(60)
    return made


async def test_to_the_host_with_a_checksum_that_the_host_completes(
    namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery
) -> None:
    nursery.start_soon(tap.run, Sink())
    with host_socket(namespace) as host:
        data, offload = udp(namespace, b"hello host")
        assert tap.put(frame_of(data, offload))
        assert await trio.to_thread.run_sync(host.recvfrom, 100) == (b"hello host", (GUEST, PORT))
        # A header that lies is the guest's fault, and only that frame is lost.
        assert tap.put(frame_of(data, Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, 60000, 6)))
        assert tap.put(frame_of(data, offload))
        await trio.to_thread.run_sync(host.recvfrom, 100)
    assert (tap.counters.tx_packets, tap.counters.tx_drops.by_reason) == (2, {Drop.REFUSED: 1})


@pytest.mark.parametrize("does", [ALL, Does(0)], ids=["offloads", "none"])
async def test_from_the_host_with_what_the_guest_can_do(
    does: Does, namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery
) -> None:
    sink = Sink(does=does)
    nursery.start_soon(tap.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    with host_socket(namespace) as host:
        host.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        host.sendto(bytes(5000), (GUEST, PORT))
    data, offload = await first_udp(sink)
    assert data[:6] == GUEST_MAC
    if does:
        assert offload is not None
        assert offload.flags & HdrFlags.NEEDS_CSUM
        if offload.gso_type:  # from Linux 6.2 on the host leaves this to the guest
            assert (offload.gso_type, offload.gso_size, len(data)) == (GsoType.UDP_L4, 1000, HEADERS + 5000)
    else:
        assert len(data) == HEADERS + 1000
        assert offload is None or not offload.flags & HdrFlags.NEEDS_CSUM


@pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
@pytest.mark.parametrize("sizes", [(1526,), (12, 1514), (300,)], ids=["one piece", "two pieces", "small"])
async def test_from_the_host_to_a_driver(
    namespace: NetNamespace, tap: TapNetdev, private: bool, sizes: tuple[int, ...]
) -> None:
    """Short and long frames in turn arrive whole and in order, in whatever buffers, more than there are at a time."""
    features = mask_of((NetFeature.MRG_RXBUF, NetFeature.CTRL_VQ, NetFeature.CTRL_RX))
    net = Net(netdev=tap, mac=GUEST_MAC.hex(":"))
    texts = [f"{number:03}".encode() * (1 + 400 * (number % 9 == 0)) for number in range(200)]
    arrived: list[bytes] = []
    async with running(net, private=private, features=features) as driver:
        tokens = [driver.add(0, [], sizes) for _ in range(64)]
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        with host_socket(namespace) as host, trio.fail_after(60):
            for text in texts:
                host.sendto(text, (GUEST, PORT))
            while len(arrived) < len(texts):
                frame, count = b"", 1
                while count:
                    used = await driver.wait(0, tokens.pop(0))
                    data = b"".join(used.data)[: used.written]
                    if not frame:
                        *_, count = HDR_CODEC.unpack_from(data)
                    frame += data
                    count -= 1
                    tokens.append(driver.add(0, [], sizes))
                    driver.kick(0)
                frame = frame[HDR_CODEC.size :]
                if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP:
                    arrived.append(frame[HEADERS:])
    assert arrived == texts


async def test_an_interface_that_was_opened_elsewhere(namespace: NetNamespace, nursery: trio.Nursery) -> None:
    """As QEMU's ``fd=``; without offload headers frames are complete."""
    fd = namespace.run(lambda: os.open("/dev/net/tun", os.O_RDWR))
    flags = tun.IfFlags.TAP | tun.IfFlags.NO_PI
    namespace.run(lambda: fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ_CODEC.pack(b"given0", flags)))
    given = TapNetdev(fd=fd)
    os.close(fd)
    assert (given.describe(), given.does) == ("tap given0", Does(0))
    namespace.ip("link set given0 up")
    namespace.ip(f"addr add {HOST}/24 dev given0")
    namespace.ip(f"neigh add {GUEST} lladdr {GUEST_MAC.hex(':')} dev given0")
    sink = Sink()
    nursery.start_soon(given.run, sink)
    with host_socket(namespace) as host:
        host.sendto(b"x", (GUEST, PORT))
    data, offload = await first_udp(sink)
    assert (data[HEADERS : HEADERS + 1], offload) == (b"x", None)
    given.close()


async def test_the_interface_goes_with_its_netdev(namespace: NetNamespace, nursery: trio.Nursery) -> None:
    tap = namespace.run(TapNetdev)
    nursery.start_soon(tap.run, Sink())
    await trio.testing.wait_all_tasks_blocked()
    assert tap.ifname in namespace.ip("link")
    assert "UP" in namespace.ip(f"link show {tap.ifname}")
    with pytest.raises(DeviceError, match="busy"):
        namespace.run(lambda: TapNetdev(ifname=tap.ifname))
    tap.close()
    await trio.testing.wait_all_tasks_blocked()
    assert tap.ifname not in namespace.ip("link")


async def test_an_interface_that_is_deleted(namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery) -> None:
    nursery.start_soon(tap.run, Sink())
    with trio.fail_after(60):
        await trio.testing.wait_all_tasks_blocked()
        namespace.ip("link del tap7")
        while tap.link:
            await tap.wait_link()
    assert tap.put(frame_of(bytes(60)))
    assert tap.counters.tx_drops.by_reason == {Drop.NO_PEER: 1}


@pytest.mark.parametrize("hashes", [False, True], ids=["nothing is read", "a frame was read"])
async def test_an_interface_that_is_deleted_while_the_driver_has_no_buffers(
    namespace: NetNamespace, tap: TapNetdev, mock_clock: trio.testing.MockClock, hashes: bool
) -> None:
    """With hashes, frames are not read to where the driver wants them, and one waits for its buffers."""
    net = Net(netdev=tap, hash=hashes)
    features = mask_of((NetFeature.STATUS, *([NetFeature.HASH_REPORT] if hashes else [])))
    async with running(net, features=features) as driver:
        with host_socket(namespace) as host:
            host.sendto(b"x", (GUEST, PORT))
        await trio.testing.wait_all_tasks_blocked(0.02)
        namespace.ip("link del tap7")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert tap.link
        mock_clock.jump(2)
        await driver.wait_config_interrupt()
        assert not tap.link
        assert driver.status & NEEDS_RESET == 0
        mock_clock.jump(2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert bool(tap.counters.rx_packets) is hashes  # taken by the device, which has no link


@pytest.mark.parametrize("queues", [1, 2])
async def test_the_next_driver_after_an_interface_was_deleted(
    namespace: NetNamespace, caplog: pytest.LogCaptureFixture, queues: int
) -> None:
    """It finds its link down; nothing is wrong with it."""
    netdev = namespace.run(lambda: TapNetdev(ifname="tap8", queues=queues))
    namespace.ip("link del tap8")
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(netdev.run, Sink(does=Does.CSUM))
            with trio.fail_after(60):
                while netdev.link:
                    await netdev.wait_link()
            await trio.testing.wait_all_tasks_blocked()
            assert netdev.put(frame_of(bytes(60)))
            nursery.cancel_scope.cancel()
    assert netdev.counters.tx_drops.by_reason == {Drop.NO_PEER: 2}
    said = [each for each in caplog.messages if "frame of" not in each]
    assert said == ["netdev: tap tap8: File descriptor in bad state"]
    netdev.close()


def test_without_the_privilege(namespace: NetNamespace) -> None:
    """An interface of one's own can be had; where something is to be done about one, the line says what."""

    def made(ifname: str) -> TapNetdev:
        return namespace.without_privilege(lambda: TapNetdev(ifname=ifname))

    with pytest.raises(
        DeviceError, match=r"not permitted: to make it takes CAP_NET_ADMIN.* ip tuntap add tap5 mode tap"
    ):
        made("tap5")
    namespace.ip(f"tuntap add tap5 mode tap user {os.getuid()} vnet_hdr")
    with pytest.raises(DeviceError, match=r"tap5: .*: it is down, .*; as root: ip link set tap5 up$"):
        made("tap5")
    namespace.ip("link set tap5 up")
    made("tap5").close()


def test_an_interface_that_is_in_use(namespace: NetNamespace, tap: TapNetdev) -> None:
    with pytest.raises(DeviceError, match=r"tap tap7: .*busy: another device, or another program, is at its other end"):
        namespace.run(lambda: TapNetdev(ifname=tap.ifname))


def test_descriptors_of_another_kind() -> None:
    """Each is named, by its number, and what it lacks."""
    with open("/dev/null") as null, pytest.raises(DeviceError, match=f"fd {null.fileno()}: .*: it is not /dev/net/tun"):
        TapNetdev(fd=null.fileno())
    with pytest.raises(DeviceError, match=r"fd 2147483647: .*: this program was not given it"):
        TapNetdev(fd=2147483647)


def test_a_descriptor_without_an_interface(namespace: NetNamespace) -> None:
    with (
        open("/dev/net/tun", "r+b", buffering=0) as opened,
        pytest.raises(DeviceError, match="no interface yet") as one,
    ):
        TapNetdev(fd=opened.fileno())
    assert "does TUNSETIFF before" in str(one.value)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="already"):
        TapNetdev(ifname="x", fd=0)
    for ifname in ("", "x" * 16, "ä" * 8, "\udcff"):
        with pytest.raises(ConfigError, match="up to 15 bytes"):
            TapNetdev(ifname=ifname)
    for ifname in ("a/b", "a:b", "a b", "..", "."):
        with pytest.raises(ConfigError, match="takes no name with a slash, a colon or a space"):
            TapNetdev(ifname=ifname)
    with pytest.raises(ConfigError, match="queues=0: expected 1 to 256"):
        TapNetdev(queues=0)
    with pytest.raises(ConfigError, match=r"fd=1099511627776: expected numbers of file descriptors, such as 3$"):
        TapNetdev(fd=1 << 40)
    with pytest.raises(ConfigError, match=r"fds=3:x: expected numbers of file descriptors, such as 3:4:5$"):
        TapNetdev(fds="3:x")
