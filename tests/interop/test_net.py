"""Network devices in Linux guests: two guests on a hub, their offloads, link, filters and commands."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.amounts import Amounts
from support.vm_devices import APPEND, MIB, Machine, booted, held

from vfiouser_virtio import serve, vm
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.hub import HubNetdev, join
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature, Status
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.qemu

ADDRESSES = ("192.0.2.1", "192.0.2.2")
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
SET_UP = "ip addr add {address}/24 dev eth0 && ip link set eth0 up && httpd -p 80 -h /tmp"


@asynccontextmanager
async def two_guests(
    qemu: vm.Qemu,
    image: vm.GuestImage,
    *,
    first_image: vm.GuestImage | None = None,
    queues: int = 1,
    first_cpus: int = 1,
) -> AsyncIterator[tuple[Machine, Machine]]:
    """Two guests on one hub: the rings of one are packed, those of the other split; 2007 ids and others."""
    one, other = (Net(netdev=HubNetdev(hub="lan"), mac=mac, queues=queues) for mac in MACS)
    async with (
        booted(
            qemu, first_image or image, {"one": one}, offer=Offer(packed=True), ids="2007", cpus=first_cpus
        ) as first,
        booted(qemu, image, {"other": other}) as second,
    ):
        for machine, address in zip((first, second), ADDRESSES, strict=True):
            await machine.run(SET_UP.format(address=address))
        yield first, second


async def test_two_guests(
    qemu: vm.Qemu, guest_image: vm.GuestImage, amounts: Amounts, caplog: pytest.LogCaptureFixture
) -> None:
    """They ping, by IPv4 and IPv6, and move a file each way over TCP, in segments that nobody cuts on the way.

    Then a link goes and comes, frames are long, have tags, and are filtered.
    One has Debian's newest Linux, the other that of its stable release.
    """
    size = amounts.tcp_file
    newest = await trio.to_thread.run_sync(vm.guest_image, "trixie-backports")
    async with two_guests(qemu, guest_image, first_image=newest) as machines:
        with trio.fail_after(600):
            releases = [await machine.run("uname -r") for machine in machines]
            assert releases == [newest.kernel.version, guest_image.kernel.version]
            for machine, other in zip(machines, ADDRESSES[::-1], strict=True):
                assert "driver: virtio_net" in await machine.run("ethtool -i eth0")
                await machine.run(f"ping -c 2 {other}")
                await machine.run(f"dd if=/dev/urandom of=/tmp/file bs=1M count={size // MIB} 2>/dev/null")
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
                assert counters.rx_bytes > size
                # 1448 bytes at most are in a packet that was cut.
                assert counters.rx_bytes / counters.rx_packets > 2000
            await check_link_mtu_and_vlan(*machines)
            for machine in machines:
                await machine.check_quiet(caplog)


async def check_link_mtu_and_vlan(one: Machine, other: Machine) -> None:
    """And announcements, and the filter. What is set stays, but for the filter's modes."""
    device = one.devices["one"]
    assert isinstance(device, Net)
    device.set_link(False)
    await one.run("while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done")
    device.set_link(True)
    await one.run("while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done")
    # Linux makes itself known, and says so, when it is asked to: by ARP, and for IPv6.
    sent = device.netdev.counters.tx_packets
    assert device.announce()
    while device.config["status"] != Status.LINK_UP or device.netdev.counters.tx_packets == sent:
        await trio.sleep(0.02)
    # 9000 bytes are no matter of the device, which was not told of a limit.
    for machine in (one, other):
        await machine.run("ip link set eth0 mtu 9000")
    await one.run(f"ping -c 2 -s 8900 {ADDRESSES[1]}")
    # Frames of a VLAN, with a tag each.
    for machine, number in zip((one, other), (1, 2), strict=True):
        await machine.run("ip link add link eth0 name eth0.7 type vlan id 7 && ip link set eth0.7 up")
        await machine.run(f"ip addr add 198.51.100.{number}/24 dev eth0.7")
    await one.run("ping -c 2 198.51.100.2")
    await check_filter(one, other)
    # Another address: what was sent to the old one is not for it any more.
    await other.run("ip link set eth0 address 52:54:00:00:00:77")
    await one.run(f"ip neigh flush all && ping -c 2 {ADDRESSES[1]}")
    await other.run("ip link set eth0 promisc on && ip link set eth0 promisc off")


PINGS = 10
FOREIGN = "192.0.2.99"


async def check_filter(one: Machine, other: Machine) -> None:
    """What the other guest's Linux sees of frames that are not for it; in the beginning both have VLAN 7."""
    device = other.devices["other"]
    assert isinstance(device, Net)
    # Nothing but what is sent here passes: no neighbour discovery, no questions for addresses.
    for machine in (one, other):
        await machine.run("for each in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$each; done")
    await one.run(
        f"arp -i eth0 -s {FOREIGN} 52:54:00:00:00:99 && arp -i eth0 -s {ADDRESSES[1]} {MACS[1]} && "
        "ip route add 224.0.0.0/4 dev eth0"
    )

    async def check(destination: str, *, seen: bool) -> None:
        """Linux tells the device of a new mode at its leisure, so that the first pings may be too early."""
        passed = 0
        for _ in range(5):
            before, filtered = await count(), device.receiver.filtered
            await one.run(f"ping -c {PINGS} -i 0.05 -W 1 {destination} >/dev/null || true")
            while await count() - before + device.receiver.filtered - filtered < PINGS:
                await trio.sleep(0.1)
            passed = await count() - before
            if (passed >= PINGS) is seen and (device.receiver.filtered - filtered < PINGS) is seen:
                return
        raise AssertionError(f"{destination}: the guest saw {passed} of {PINGS} frames")

    async def count() -> int:
        return int(await other.run("cat /sys/class/net/eth0/statistics/rx_packets"))

    await check(FOREIGN, seen=False)
    await other.run("ip link set eth0 promisc on")
    await check(FOREIGN, seen=True)
    await other.run("ip link set eth0 promisc off")
    await check(FOREIGN, seen=False)
    # Of groups that of all hosts is in its list (RFC 1112), as long as it has IPv4.
    await check("224.0.0.1", seen=True)
    await check("239.1.2.3", seen=False)
    await other.run("ifconfig eth0 allmulti")
    await check("239.1.2.3", seen=True)
    await other.run("ifconfig eth0 -allmulti")
    await check("239.1.2.3", seen=False)
    # A VLAN that it has not, to its own address.
    await one.run(
        "ip link add link eth0 name eth0.8 type vlan id 8 && ip addr add 203.0.113.1/24 dev eth0.8 && "
        f"ip link set eth0.8 up && arp -i eth0.8 -s 203.0.113.2 {MACS[1]}"
    )
    await check("203.0.113.2", seen=False)
    await other.run(
        "ip link add link eth0 name eth0.8 type vlan id 8 && ip addr add 203.0.113.2/24 dev eth0.8 && "
        "ip link set eth0.8 up"
    )
    await check("203.0.113.2", seen=True)
    await one.run("ping -c 1 203.0.113.2")
    await one.run(f"arp -i eth0 -d {ADDRESSES[1]}")


QUEUES = 4


@pytest.mark.variant
async def test_several_queues_and_a_driver_that_leaves_and_comes_back(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    """One guest has four CPUs, the other one. A TCP transfer goes on over the driver's absence."""
    async with two_guests(qemu, guest_image, queues=QUEUES, first_cpus=QUEUES) as machines:
        one, other = machines
        device, sender = one.devices["one"], other.devices["other"]
        assert isinstance(device, Net)
        assert isinstance(sender, Net)

        def tried() -> int:
            """Packets of the other guest, also those that reach nobody."""
            return sender.netdev.counters.tx_packets + sender.netdev.counters.tx_dropped

        with trio.fail_after(400):
            assert f"Combined:\t{QUEUES}" in await one.run("ethtool -l eth0")
            await one.run("ethtool -L eth0 combined 1 && ethtool -L eth0 combined 4")
            assert "RX flow hash indirection table" in await one.run("ethtool -x eth0")
            await check_spread(one, other, device)
            await check_segmentation(one, other, device)

            # Read as slowly as the transfer is to be, with little that waits in between. The address is known already.
            await one.run("dd if=/dev/urandom of=/tmp/file bs=1M count=8 2>/dev/null")
            expected = await one.run("sha256sum </tmp/file")
            slowly = "while dd bs=64k count=1 of=/tmp/x 2>/dev/null; [ -s /tmp/x ]; do cat /tmp/x; sleep 0.05; done"
            await other.run(
                f"arp -i eth0 -s {ADDRESSES[0]} {MACS[0]}\n"
                "echo 4096 131072 131072 >/proc/sys/net/ipv4/tcp_rmem\n"
                f"(wget -q -O - http://{ADDRESSES[0]}/file | ({slowly}) | sha256sum >/tmp/sum) &\n"
                f"ping -c 100000 -i 0.05 {ADDRESSES[0]} >/dev/null 2>&1 &"
            )
            for _ in range(2):
                await passes(sender.netdev.counters.rx_bytes + MIB // 4, lambda: sender.netdev.counters.rx_bytes)
                await one.run("cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 >unbind")
                await passes(tried() + 10, tried)
                await one.run(
                    "cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 >bind && "
                    f"{SET_UP.format(address=ADDRESSES[0]).partition(' && httpd')[0]}"
                )
                await one.run(f"ping -c 2 {ADDRESSES[1]}")
            assert not await other.run("cat /tmp/sum"), "the transfer has ended before the driver left the last time"
            await other.run("until [ -s /tmp/sum ]; do sleep 0.2; done")
            assert await other.run("cat /tmp/sum") == expected
            before = tried()
            await one.guest.reboot()
            assert tried() > before + 10
            await one.run(SET_UP.format(address=ADDRESSES[0]))
            await one.run(f"ping -c 2 {ADDRESSES[1]}")
            for machine in machines:
                await machine.check_quiet(caplog)


async def passes(count: int, counted: Callable[[], int]) -> None:
    """Wait until a counter is there."""
    while counted() < count:
        await trio.sleep(0.02)


async def check_spread(one: Machine, other: Machine, device: Net) -> None:
    """Each queue has an interrupt of its own, and flows of different ports are on different queues."""
    found = re.findall(
        r"^ *(\d+):.* virtio0-((?:in|out)put\.\d+)$", await one.run("cat /proc/interrupts"), re.MULTILINE
    )
    vectors = {name: number for number, name in found}
    assert set(vectors) == {f"{way}put.{queue}" for way in ("in", "out") for queue in range(QUEUES)}
    assert len(set(vectors.values())) == 2 * QUEUES
    await one.run("echo small >/tmp/small")
    # By chance all of them are on two queues at most once in 10^9 runs.
    await other.run(f"for i in $(seq 32); do wget -q -O /dev/null http://{ADDRESSES[0]}/small; done")
    used = [queue.packets > 0 and queue.queue.interrupts > 0 for queue in device.receiver.queues]
    assert sum(used) > 2, [queue.packets for queue in device.receiver.queues]


async def check_segmentation(one: Machine, other: Machine, device: Net) -> None:
    """What ethtool -K turns off is not used any more, and what it turns on is."""

    async def segments() -> int:
        """Packets that were to be segmented, of a file that the other guest gets."""
        before = sum(queue.gso_packets for queue in device.transmitter.queues)
        expected = await one.run("dd if=/dev/urandom of=/tmp/part bs=64k count=16 2>/dev/null; sha256sum </tmp/part")
        assert await other.run(f"wget -q -O - http://{ADDRESSES[0]}/part | sha256sum") == expected
        return sum(queue.gso_packets for queue in device.transmitter.queues) - before

    assert await segments() > 0
    await one.run("ethtool -K eth0 tso off && ethtool -k eth0 | grep -q '^tcp-segmentation-offload: off'")
    assert await segments() == 0
    await one.run("ethtool -K eth0 tx off && ethtool -k eth0 | grep -q '^tx-checksumming: off'")
    assert await segments() == 0
    await one.run("ethtool -K eth0 tx on tso on")
    assert await segments() > 0


# Lines about a QEMU that was killed.
MAX_WORDS = 5
OTHER_RINGS = Offer(packed=True, in_order=True, event_idx=False, notification_data=True)


@pytest.mark.variant
async def test_a_guest_of_qemu_s_own_network_joins(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two guests on a hub of ours, and a third one whose network device, and netdev, are QEMU's.

    The memory of one of ours is reached by messages, and its rings have what those of others have not.
    Then the first one's QEMU is killed in the middle of a transfer: the network goes on, nothing of it is left, and
    another one takes its place.
    """
    stream = StreamNetdev(addr__path=tmp_path / "net.sock", server=True)
    devices = [Net(netdev=HubNetdev(hub="lan"), mac=mac) for mac in MACS]
    theirs = [
        *("-netdev", f"stream,id=n0,server=off,addr.type=unix,addr.path={tmp_path / 'net.sock'}"),
        *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:03"),
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(join, HubNetdev(hub="lan"), stream)
        async with (
            booted(qemu, guest_image, {"other": devices[1]}, memory="private", offer=OTHER_RINGS) as second,
            vm.boot_guest(qemu, guest_image, extra_args=theirs, append=APPEND) as third,
            serve(function := VirtioPci(devices[0], name="one")) as served,
        ):
            with trio.fail_after(500):
                await second.run(f"{SET_UP.format(address=ADDRESSES[1])} && echo ok >/tmp/ok")
                await third.run(
                    f"ip addr add 192.0.2.3/24 dev eth0; ip link set eth0 up; ping -c 2 {ADDRESSES[1]}", check=True
                )
                async with vm.boot_guest(qemu, guest_image, devices=served.qemu_devices, append=APPEND) as guest:
                    first = Machine(guest, {"one": devices[0]})
                    await first.run(SET_UP.format(address=ADDRESSES[0]))
                    await first.run("dd if=/dev/urandom of=/tmp/file bs=1M count=4 2>/dev/null")
                    expected = await first.run("sha256sum </tmp/file")
                    got = await third.run(f"wget -q -O - http://{ADDRESSES[0]}/file | sha256sum", check=True)
                    assert got.output.rstrip() == expected
                    await second.run("ping -c 2 192.0.2.3")
                    await first.check_quiet(caplog)

                    # A file of holes, larger than what crosses until the end.
                    await first.run("truncate -s 8G /tmp/big")
                    await second.run(f"wget -q -O /dev/null http://{ADDRESSES[0]}/big >/dev/null 2>&1 &")
                    counters = devices[1].netdev.counters
                    await passes(counters.rx_bytes + 4 * MIB, lambda: counters.rx_bytes)
                    caplog.clear()
                    guest.kill()
                    await guest.wait_exit()
                await second.run(f"ping -c 2 192.0.2.3 && ! ping -c 4 -W 2 {ADDRESSES[0]}")
                with trio.fail_after(60):
                    while function.memory.regions:
                        await trio.sleep(0.02)
                assert devices[0].receiver.drops[Drop.NO_CLIENT] > 0
                assert len(caplog.records) <= MAX_WORDS
                killed = held()

                async with vm.boot_guest(qemu, guest_image, devices=served.qemu_devices, append=APPEND) as guest:
                    first = Machine(guest, {"one": devices[0]})
                    await first.run(SET_UP.format(address=ADDRESSES[0]))
                    await first.run(f"ping -c 2 {ADDRESSES[1]} && wget -q -O /dev/null http://{ADDRESSES[1]}/ok")
                ended = held()
                for what in ("fds", "mappings of guest memory", "threads"):
                    assert killed[what] <= ended[what], what
                await second.check_quiet(caplog)
        nursery.cancel_scope.cancel()
    stream.close()
