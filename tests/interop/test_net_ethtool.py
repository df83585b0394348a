"""What ethtool sets and shows in a Linux guest: channels, RSS, coalescing, offloads, statistics, rings."""

import re

import pytest
import trio
from support.packets import Packet
from support.vm_devices import booted

from vfiouser_virtio import vm
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature

pytestmark = pytest.mark.qemu

FEATURES = ("CTRL_VQ", "MQ", "RSS", "HASH_REPORT", "NOTF_COAL", "VQ_NOTF_COAL", "DEVICE_STATS", "MTU", "SPEED_DUPLEX")
KEY = ":".join(f"{byte:02x}" for byte in range(40))


@pytest.mark.variant
async def test_ethtool(qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture) -> None:
    device = Net(mac="52:54:00:00:00:01", queues=2, hash=True, mtu=1400, speed=2500, duplex="half")
    steering = device.control.settings.steering
    async with booted(qemu, guest_image, {"nic": device}, cpus=2) as machine:
        with trio.fail_after(400):
            run = machine.run
            for feature in FEATURES:
                assert device.negotiated(NetFeature[feature])
            await run("ip link set eth0 up")
            assert (await run("cd /sys/class/net/eth0; cat mtu speed duplex")).split() == ["1400", "2500", "half"]
            about = await run("ethtool -i eth0")
            assert "driver: virtio_net" in about
            assert "bus-info: 0000:00:01.0" in about
            assert re.search(r"Current.*Combined:\t2", await run("ethtool -l eth0"), re.DOTALL)
            await run("ethtool -L eth0 combined 1")
            assert re.search(r"Current.*Combined:\t1", await run("ethtool -l eth0"), re.DOTALL)
            assert steering.pairs == 1
            await run("ethtool -L eth0 combined 2")
            assert steering.pairs == 2

            await run(f"ethtool -X eth0 hkey {KEY} equal 1")
            shown = await run("ethtool -x eth0")
            assert KEY in shown
            assert "toeplitz: on" in shown
            assert re.search(r"^ +0: +0 +0 +0 +0", shown, re.MULTILINE)
            flows = [
                frame_of(Packet(b"", addresses=bytes([10, 0, 0, 1, 10, 0, 1, each])).build(partial=False))
                for each in range(64)
            ]
            assert {steering.steer(frame)[0] for frame in flows} == {0}
            await run("ethtool -X eth0 equal 2")
            assert re.search(r"^ +0: +0 +1 +0 +1", await run("ethtool -x eth0"), re.MULTILINE)
            assert {steering.steer(frame)[0] for frame in flows} == {0, 1}

            await run("ethtool -C eth0 rx-usecs 5000 rx-frames 32 tx-usecs 3000 tx-frames 8")
            assert [queue.coalescing for queue in device.queues[:4]] == [(32, 5000), (8, 3000)] * 2
            shown = await run("ethtool -c eth0")
            for setting in ("rx-usecs:\t5000", "rx-frames:\t32", "tx-usecs:\t3000", "tx-frames:\t8"):
                assert setting in shown
            await run("ethtool --per-queue eth0 queue_mask 0x2 --coalesce rx-usecs 2000 rx-frames 4")
            assert [queue.coalescing for queue in device.queues[:4:2]] == [(32, 5000), (4, 2000)]
            shown = await run("ethtool --per-queue eth0 queue_mask 0x2 --show-coalesce")
            assert re.search(r"rx-usecs:\s+2000", shown)
            assert re.search(r"rx-frames:\s+4\b", shown)
            # Its ring is another one then, and Linux says again what it wants of it.
            await run("ethtool -G eth0 rx 128")
            assert [queue.size for queue in device.queues[:2]] == [128, 256]
            await run("ethtool -C eth0 rx-usecs 0 rx-frames 0 tx-usecs 0 tx-frames 1")

            before = device.receiver.does
            offloads = await run("ethtool -k eth0")
            for offload in ("rx-checksumming", "tx-checksumming", "tcp-segmentation-offload", "rx-gro-hw"):
                assert f"{offload}: on" in offloads
            await run("ethtool -K eth0 rx-gro-hw off")
            assert "rx-gro-hw: off" in await run("ethtool -k eth0")
            assert device.receiver.does == Does.CSUM
            await run("ethtool -K eth0 rx-gro-hw on")
            assert device.receiver.does == before

            # For IPv6 it looks for others that have its address; when is up to it.
            await run("while [ $(cat /sys/class/net/eth0/statistics/tx_packets) = 0 ]; do sleep 0.1; done")
            statistics = await run("ethtool -S eth0")
            counted = {name: int(value) for name, value in re.findall(r"(\w+): (\d+)", statistics)}
            assert counted["cq_hw_command_num"] == counted["cq_hw_ok_num"] > 10
            sent = device.transmitter.queues
            assert 0 < counted["tx_hw_packets"] <= sum(each.packets for each in sent)
            await machine.check_quiet(caplog)
