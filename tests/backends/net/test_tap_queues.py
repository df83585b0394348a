"""The tap netdev with several queues, on real interfaces in a network namespace of the test's own."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import trio
import trio.testing
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.net_tap import GUEST, GUEST_MAC, HOST, PORT, new_tap

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.vfio_device import Buffer

QUEUES = 3


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[TapNetdev]:
    made = new_tap(namespace, queues=QUEUES)
    yield made
    made.close()


def attached(namespace: NetNamespace, ifname: str = "tap7") -> tuple[int, int]:
    """Queues that the kernel uses, and those that it does not."""
    found = re.search(r"numqueues (\d+) numdisabled (\d+)", namespace.ip(f"-d link show {ifname}"))
    assert found
    return int(found[1]), int(found[2])


async def wait_attached(namespace: NetNamespace, count: int) -> None:
    with trio.fail_after(60):
        while attached(namespace) != (count, QUEUES - count):
            await trio.sleep(0.01)


def datagram(namespace: NetNamespace, port: int) -> bytes:
    """From the guest to the host, without a checksum."""
    host_mac = bytes.fromhex(namespace.ip("-o link show tap7").split("link/ether ")[1][:17].replace(":", ""))
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
    ip = bytearray(bytes.fromhex("4500001d000100004011 0000") + addresses)
    total = sum(int.from_bytes(ip[at : at + 2], "big") for at in range(0, 20, 2))
    ip[10:12] = (0xFFFF - (total % 0xFFFF)).to_bytes(2, "big")
    udp = port.to_bytes(2, "big") + PORT.to_bytes(2, "big") + bytes.fromhex("0009 0000") + b"!"
    return host_mac + GUEST_MAC + b"\x08\x00" + bytes(ip) + udp


async def test_as_many_queues_are_attached_as_the_driver_uses(
    namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery
) -> None:
    assert attached(namespace) == (QUEUES, 0)
    nursery.start_soon(tap.run, Sink())
    for count in (1, 3, 2, 1, 3):
        tap.use(count)
        await wait_attached(namespace, count)


@pytest.mark.parametrize("again", [False, True], ids=["first", "attached again"])
async def test_answers_come_on_the_queue_that_the_guest_has_used(
    namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    sinks = [Sink() for _ in tap.queues]
    for queue, sink in zip(tap.queues, sinks, strict=True):
        nursery.start_soon(queue.run, sink)
    if again:
        readv = os.readv

        def as_kernels_that_fail(fd: int, buffers: Sequence[Buffer]) -> int:
            if any(fd == queue._fd and not queue.attached for queue in tap.queues):  # noqa: SLF001 - which one it is
                raise OSError(errno.EBADFD, os.strerror(errno.EBADFD))
            return readv(fd, buffers)

        monkeypatch.setattr(os, "readv", as_kernels_that_fail)  # others say EAGAIN of a queue that is not attached
        for on in (False, True):
            await trio.testing.wait_all_tasks_blocked()
            for queue in tap.queues[1:]:
                await queue.attach(on)
    with namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as host:
        host.bind((HOST, PORT))
        host.settimeout(60)
        for number in range(9):
            pair = number % QUEUES
            assert tap.queues[pair].put(frame_of(datagram(namespace, 1000 + number)))
            assert await trio.to_thread.run_sync(host.recvfrom, 10) == (b"!", (GUEST, 1000 + number))
            host.sendto(bytes([number]), (GUEST, 1000 + number))
            wanted = PORT.to_bytes(2, "big") + (1000 + number).to_bytes(2, "big")
            with trio.fail_after(60):
                while not any(frame.tobytes()[34:38] == wanted for frame in sinks[pair].frames):
                    await sinks[pair].wait_frames(len(sinks[pair].frames) + 1)


async def test_what_is_sent_on_a_queue_that_is_not_attached_arrives(
    namespace: NetNamespace, tap: TapNetdev, nursery: trio.Nursery
) -> None:
    sink = Sink()
    nursery.start_soon(tap.run, sink)
    await wait_attached(namespace, 1)
    with namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as host:
        host.bind((HOST, PORT))
        host.settimeout(60)
        with trio.fail_after(60):
            while not tap.queues[2].put(frame_of(datagram(namespace, 1000))):
                await tap.queues[2].wait_room()
        assert await trio.to_thread.run_sync(host.recvfrom, 10) == (b"!", (GUEST, 1000))
        assert tap.counters.tx_dropped == 0
        # And what comes back does so on the one that is.
        host.sendto(b"?", (GUEST, 1000))
        with trio.fail_after(60):
            while not any(frame.tobytes()[42:43] == b"?" for frame in sink.frames):
                await sink.wait_frames(len(sink.frames) + 1)


async def set_pairs(driver: Driver, pairs: int) -> None:
    used = await driver.request([b"\4\0" + pairs.to_bytes(2, "little")], [1], queue=len(driver.rings) - 1)
    assert used.data == [b"\0"]


async def test_with_a_device(namespace: NetNamespace, tap: TapNetdev) -> None:
    net = Net(netdev=tap, queues=QUEUES)
    assert [each.sink for each in net.transmitter.queues] == tap.queues
    async with running(net, features=NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask) as driver:
        await wait_attached(namespace, 1)
        for pairs in (3, 2):
            await set_pairs(driver, pairs)
            await wait_attached(namespace, pairs)
        await driver.reset()
        driver.probe()
        await wait_attached(namespace, 1)


async def test_more_pairs_than_queues_share_them(namespace: NetNamespace, tap: TapNetdev) -> None:
    net = Net(netdev=tap, queues=5)
    assert [each.sink for each in net.transmitter.queues] == [*tap.queues, *tap.queues[:2]]


async def test_the_interface_goes_with_the_last_queue(namespace: NetNamespace, nursery: trio.Nursery) -> None:
    tap = namespace.run(lambda: TapNetdev(queues=2))
    nursery.start_soon(tap.run, Sink())
    await trio.testing.wait_all_tasks_blocked()
    tap.use(2)
    assert tap.ifname in namespace.ip("link")
    tap.close()
    await trio.testing.wait_all_tasks_blocked()
    assert tap.ifname not in namespace.ip("link")


def test_interfaces_that_others_have_made(namespace: NetNamespace) -> None:
    namespace.ip("tuntap add tap8 mode tap vnet_hdr")
    namespace.ip("tuntap add tap9 mode tap vnet_hdr multi_queue")
    for ifname, queues in (("tap8", 1), ("tap9", 1), ("tap9", 2)):
        made = namespace.run(partial(TapNetdev, ifname=ifname, queues=queues))
        assert (made.ifname, len(made.queues)) == (ifname, queues)
        made.close()
    with pytest.raises(DeviceError, match=r"tap tap8: .*ip tuntap add tap8 mode tap user \$USER vnet_hdr multi_queue"):
        namespace.run(lambda: TapNetdev(ifname="tap8", queues=2))


def test_queues_that_were_opened_elsewhere(namespace: NetNamespace) -> None:
    flags = tun.IfFlags.TAP | tun.IfFlags.NO_PI | tun.IfFlags.MULTI_QUEUE | tun.IfFlags.VNET_HDR

    def opened(name: bytes) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ_CODEC.pack(name, flags))
        return fd

    one, other, strange = (namespace.run(partial(opened, name)) for name in (b"tap3", b"tap3", b"tap4"))
    try:
        made = TapNetdev(fds=f"{one}:{other}", queues=2)
        assert (made.describe(), len(made.queues)) == ("tap tap3", 2)
        made.close()
        with pytest.raises(DeviceError, match="of several interfaces"):
            TapNetdev(fds=f"{one}:{strange}", queues=2)
        with pytest.raises(ConfigError, match="2 queues in fds, but queues=1"):
            TapNetdev(fds=f"{one}:{other}")
    finally:
        for fd in (one, other, strange):
            os.close(fd)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="expected numbers of file descriptors"):
        TapNetdev(fds="3:x", queues=2)
    with pytest.raises(ConfigError, match="do not go together"):
        TapNetdev(fds="3:4", fd=3, queues=2)
