"""VXLAN between two Linux guests on a hub, whose TCP segments nobody cuts (UDP tunnel segmentation, Linux 6.17)."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from support.vm_devices import MIB, booted

from vfiouser_virtio import vm
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.vm import debian, modules, newc, programs

pytestmark = [pytest.mark.qemu, pytest.mark.variant]

OUTER, INNER = ("192.0.2.1", "192.0.2.2"), ("198.51.100.1", "198.51.100.2")
SIZE = 4 * MIB


def image_with_vxlan(folder: Path) -> vm.GuestImage:
    """The small guest with what it lacks: modules, and an ``ip`` that can make a VXLAN (busybox's cannot)."""
    image = vm.guest_image("trixie-backports")
    found = image.kernel.modules
    assert found is not None
    wanted = modules.resolve(modules.parse_dep((found / "modules.dep").read_text()), ["vxlan"])
    tools = debian.fetch("guest-iproute2", ["iproute2"], what="the guest's ip", megabytes=10)
    program = programs.find_program(tools, "ip")
    libraries = programs.libraries(tools, program)
    entries = [
        newc.file("vx/ip", program.read_bytes(), 0o755),
        newc.file("vx/modules", "\n".join(modules.module_name(path) for path in wanted).encode()),
        *(newc.file(f"vx/{modules.module_name(path)}.ko", modules.read_module(found / path)) for path in wanted),
        *(newc.file(f"vx/lib/{name}", file.read_bytes(), 0o755) for name, file in libraries.items()),
    ]
    target = folder / "initramfs.cpio"
    target.write_bytes(image.initramfs.read_bytes() + newc.pack(entries))
    return replace(image, initramfs=target)


SET_UP = """
for module in $(cat /vx/modules); do insmod /vx/$module.ko 2>/dev/null || grep -q "^$module " /proc/modules; done
ip addr add {own}/24 dev eth0
ip link set eth0 up
httpd -p 80 -h /tmp
"""
VXLAN = """
/vx/lib/ld-linux-x86-64.so.2 --library-path /vx/lib /vx/ip link add vx0 type vxlan id 42 dstport 4789 \\
    local {own} remote {other} dev eth0 {checksum}
ip addr add {inner}/24 dev vx0
ip link set vx0 up
"""


async def test_segments_of_a_vxlan_cross_whole(qemu: vm.Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a checksum of the outer UDP header, and without."""
    image = await trio.to_thread.run_sync(image_with_vxlan, tmp_path)
    devices = [
        Net(
            netdev=HubNetdev(hub="lan"),
            mac=f"52:54:00:00:00:0{n}",
            host_tunnel=True,
            host_tunnel_csum=True,
            guest_tunnel=True,
            guest_tunnel_csum=True,
        )
        for n in (1, 2)
    ]
    async with (
        booted(qemu, image, {"one": devices[0]}) as first,
        booted(qemu, image, {"other": devices[1]}) as second,
    ):
        with trio.fail_after(600):
            ends = list(zip((first, second), devices, OUTER, OUTER[::-1], INNER, strict=True))
            for machine, device, own, _, _ in ends:
                for feature in (NetFeature.HOST_UDP_TUNNEL_GSO_CSUM, NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM):
                    assert device.negotiated(feature)
                features = await machine.run("ethtool -k eth0")
                for name in ("tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"):
                    assert re.search(rf"{name}: on$", features, re.MULTILINE), features
                await machine.run(SET_UP.format(own=own))
            await second.run(f"dd if=/dev/urandom of=/tmp/file bs=1M count={SIZE // MIB} 2>/dev/null")
            expected = await second.run("sha256sum </tmp/file")
            for checksum in ("noudpcsum", "udpcsum"):
                for machine, _, own, other, inner in ends:
                    await machine.run(VXLAN.format(own=own, other=other, inner=inner, checksum=checksum))
                await first.run(f"ping -c 2 {INNER[1]}")
                assert await first.run(f"wget -q -O - http://{INNER[1]}/file | sha256sum") == expected
                for machine in (first, second):
                    await machine.run("ip link del vx0")

            sent = devices[1].transmitter.queues[0]
            assert sent.drops == 0
            assert sent.gso_packets_noseg == sent.gso_packets
            assert sent.gso_segments == 0
            assert sent.gso_bytes > SIZE
            # What was cut has 1500 bytes and less; how much is sent at once is up to TCP, and less on a busy machine.
            assert sent.gso_bytes / sent.gso_packets > 1500
            assert devices[0].netdev.counters.rx_bytes > SIZE
            for machine in (first, second):
                await machine.check_quiet(caplog)
