"""Network devices in Linux guests: two guests on a hub, their offloads, link, filters and commands."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.vm_devices import MIB, Machine, booted

from vfiouser_virtio import vm
from vfiouser_virtio.backends.net.hub import HubNetdev, join
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.qemu

ADDRESSES = ("192.0.2.1", "192.0.2.2")
SET_UP = "ip addr add {address}/24 dev eth0 && ip link set eth0 up && httpd -p 80 -h /tmp"


@asynccontextmanager
async def two_guests(
    qemu: vm.Qemu, image: vm.GuestImage, *, queues: int = 1, cpus: int = 1
) -> AsyncIterator[tuple[Machine, Machine]]:
    """Two guests on one hub: the rings of one are packed, those of the other split; 2007 ids and others."""
    one, other = (Net(netdev=HubNetdev(hub="lan"), mac=f"52:54:00:00:00:0{n}", queues=queues) for n in (1, 2))
    async with (
        booted(qemu, image, {"one": one}, offer=Offer(packed=True), ids="2007", cpus=cpus) as first,
        booted(qemu, image, {"other": other}, cpus=cpus) as second,
    ):
        for machine, address in zip((first, second), ADDRESSES, strict=True):
            await machine.run(SET_UP.format(address=address))
        yield first, second


async def test_two_guests(
    qemu: vm.Qemu, guest_image: vm.GuestImage, long_run: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """They ping, by IPv4 and IPv6, and move a file each way over TCP, in segments that nobody cuts on the way."""
    size = 100 if long_run else 8
    async with two_guests(qemu, guest_image) as machines:
        with trio.fail_after(600):
            for machine, other in zip(machines, ADDRESSES[::-1], strict=True):
                assert "driver: virtio_net" in await machine.run("ethtool -i eth0")
                await machine.run(f"ping -c 2 {other}")
                await machine.run(f"dd if=/dev/urandom of=/tmp/file bs=1M count={size} 2>/dev/null")
            sums = [await machine.run("sha256sum </tmp/file") for machine in machines]
            address = await machines[1].run("ip -6 addr show dev eth0 scope link | awk '/inet6/ { print $2 }'")
            await machines[0].run(f"ping6 -c 2 -I eth0 {address.partition('/')[0]}")
            for machine, other, expected in zip(machines, ADDRESSES[::-1], sums[::-1], strict=True):
                assert await machine.run(f"wget -q -O - http://{other}/file | sha256sum") == expected
            for machine in machines:
                device = next(iter(machine.devices.values()))
                assert isinstance(device, Net)
                assert device.negotiated(NetFeature.MRG_RXBUF)
                counters = device.netdev.counters
                assert counters.tx_dropped == 0
                assert counters.rx_bytes > size * MIB
                # 1448 bytes at most are in a packet that was cut.
                assert counters.rx_bytes / counters.rx_packets > 2000
                await machine.check_quiet(caplog)


async def test_link_mtu_filter_and_vlan(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_guests(qemu, guest_image) as machines:
        one, other = machines
        device = one.devices["one"]
        assert isinstance(device, Net)
        with trio.fail_after(300):
            device.set_link(False)
            await one.run("while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done")
            device.set_link(True)
            await one.run("while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done")
            # 9000 bytes are no matter of the device, which was not told of a limit.
            for machine in machines:
                await machine.run("ip link set eth0 mtu 9000")
            await one.run(f"ping -c 2 -s 8900 {ADDRESSES[1]}")
            # Frames of a VLAN, with a tag each.
            for machine, number in zip(machines, (1, 2), strict=True):
                await machine.run("ip link add link eth0 name eth0.7 type vlan id 7 && ip link set eth0.7 up")
                await machine.run(f"ip addr add 198.51.100.{number}/24 dev eth0.7")
            await one.run("ping -c 2 198.51.100.2")
            # Another address: what was sent to the old one is not for it any more.
            await other.run("ip link set eth0 address 52:54:00:00:00:77")
            await one.run(f"ip neigh flush all && ping -c 2 {ADDRESSES[1]}")
            await other.run("ip link set eth0 promisc on && ip link set eth0 promisc off")
            for machine in machines:
                await machine.check_quiet(caplog)


@pytest.mark.variant
async def test_several_queues_and_a_driver_that_leaves_and_comes_back(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_guests(qemu, guest_image, queues=2, cpus=2) as machines:
        one, other = machines
        with trio.fail_after(400):
            assert "Combined:\t2" in await one.run("ethtool -l eth0")
            await one.run("ethtool -L eth0 combined 1 && ethtool -L eth0 combined 2")
            assert "RX flow hash indirection table" in await one.run("ethtool -x eth0")
            await other.run(f"ping -c 1000 -i 0.1 {ADDRESSES[0]} >/dev/null 2>&1 &")
            for _ in range(2):
                await one.run(
                    "cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 >unbind && echo virtio0 >bind && cd / && "
                    f"{SET_UP.format(address=ADDRESSES[0]).partition(' && httpd')[0]}"
                )
                await one.run(f"ping -c 2 {ADDRESSES[1]}")
            await one.guest.reboot()
            await one.run(SET_UP.format(address=ADDRESSES[0]))
            await one.run(f"ping -c 2 {ADDRESSES[1]}")
            for machine in machines:
                await machine.check_quiet(caplog)


@pytest.mark.variant
async def test_a_guest_of_qemu_s_own_network_joins(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two guests on a hub of ours, and a third one whose network device, and netdev, are QEMU's."""
    stream = StreamNetdev(addr__path=tmp_path / "net.sock", server=True)
    devices = [Net(netdev=HubNetdev(hub="lan"), mac=f"52:54:00:00:00:0{n}") for n in (1, 2)]
    theirs = [
        *("-netdev", f"stream,id=n0,server=off,addr.type=unix,addr.path={tmp_path / 'net.sock'}"),
        *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:03"),
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(join, HubNetdev(hub="lan"), stream)
        async with (
            booted(qemu, guest_image, {"one": devices[0]}) as first,
            booted(qemu, guest_image, {"other": devices[1]}) as second,
            vm.boot_guest(qemu, guest_image, extra_args=theirs) as third,
        ):
            with trio.fail_after(300):
                for machine, address in zip((first, second), ADDRESSES, strict=True):
                    await machine.run(SET_UP.format(address=address))
                await third.run(
                    f"ip addr add 192.0.2.3/24 dev eth0; ip link set eth0 up; ping -c 2 {ADDRESSES[0]}", check=True
                )
                await first.run("dd if=/dev/urandom of=/tmp/file bs=1M count=4 2>/dev/null")
                expected = await first.run("sha256sum </tmp/file")
                got = await third.run(f"wget -q -O - http://{ADDRESSES[0]}/file | sha256sum", check=True)
                assert got.output.rstrip() == expected
                await second.run("ping -c 2 192.0.2.3")
                await first.check_quiet(caplog)
        nursery.cancel_scope.cancel()
    stream.close()
