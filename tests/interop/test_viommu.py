"""Devices behind the guest's IOMMU (QEMU's intel-iommu): each page of each request is mapped, used and unmapped.

Linux gives out I/O addresses from 4 GiB downwards, and the guest's RAM ends at 512 MiB: an address that a device uses
is never one of the guest's physical addresses, so what works here works by the map.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from support.amounts import Amounts
from support.vm_devices import (
    MIB,
    Machine,
    ObservedDisk,
    booted,
    booted_from_options,
    difference,
    fill,
    held,
    sparse,
    talk,
)

from vfiouser_virtio import vm
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.qemu

PAGE = 4096
RAM_END = 512 * MIB


# The second interface is in a network namespace of its own, so that what is sent to it goes over both devices.
SEPARATE_NETWORKS = """
unshare -n sleep 3600 &
other=$!
echo $other >/tmp/other
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link set eth1 netns $other
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
nsenter -t $other -n sh -c 'ip addr add 192.0.2.2/24 dev eth1 && ip link set eth1 up && httpd -p 80 -h /tmp'
httpd -p 80 -h /tmp
"""
TRANSFER = """
inside="nsenter -t $(cat /tmp/other) -n"
ping -c 2 192.0.2.2
dd if=/dev/urandom of=/tmp/file bs=256k count=2 2>/dev/null
wget -q -O /tmp/there http://192.0.2.2/file
cmp /tmp/file /tmp/there
$inside wget -q -O /tmp/back http://192.0.2.1/file
cmp /tmp/file /tmp/back
"""


def behind_iommu(intremap: str = "off", kernel: str = "") -> dict[str, Any]:
    """`vm.boot_guest`'s options."""
    return {
        "extra_args": ["-device", f"intel-iommu,caching-mode=on,intremap={intremap}"],
        "append": f"intel_iommu=on iommu.strict=1 {kernel}",
    }


@contextmanager
def changes(memory: GuestMemory) -> Iterator[list[int]]:
    """How many regions there were after each change of the map."""
    counts: list[int] = []

    def counted(change: Callable[..., Hold | None]) -> Callable[..., Hold | None]:
        def call(*args: Any, **options: Any) -> Hold | None:
            try:
                return change(*args, **options)
            finally:
                counts.append(len(memory.regions))

        return call

    with (
        mock.patch.object(memory, "map", counted(memory.map)),
        mock.patch.object(memory, "unmap", counted(memory.unmap)),
    ):
        yield counts


def check_addresses(memory: GuestMemory) -> None:
    """Nothing but single pages, at I/O addresses."""
    assert memory.regions
    for region in memory.regions:
        assert region.end - region.address == PAGE, region
        assert RAM_END <= region.address < 1 << 32, region


@pytest.mark.parametrize(
    ("memory", "rings"),
    [
        ("shared", ""),
        pytest.param("private", ",packed=on,indirect-desc=off", marks=pytest.mark.variant),
    ],
)
async def test_every_device_behind_an_iommu(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, memory: str, rings: str
) -> None:
    source, target, random = tmp_path / "source", tmp_path / "target", tmp_path / "random"
    fill(source, 2 * MIB)
    sparse(target, 2 * MIB)
    random.write_bytes(os.urandom(4096))
    devices = [
        f"blk,path={source}",
        f"blk,path={target}",
        f"rng,source={random}",
        f"console,name=p,chardev=unix:{tmp_path / 'p'}",
        "net,hub=lan,mac=52:54:00:00:00:01",
        "net,hub=lan,mac=52:54:00:00:00:02",
    ]
    async with booted_from_options(
        qemu,
        guest_image,
        [f"{device},iommu-platform=on{rings}" for device in devices],
        memory=memory,
        **behind_iommu("on"),
    ) as machine:
        for number, function in enumerate(machine.functions.values()):
            features = await machine.run(f"cat /sys/bus/virtio/devices/virtio{number}/features")
            assert features[Feature.ACCESS_PLATFORM] == "1"
            check_addresses(function.memory)
        await machine.run("dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct 2>/dev/null")
        assert await difference(source, target, 2 * MIB) == ""
        read = await machine.guest.run("dd if=/dev/hwrng bs=16 count=64 2>/dev/null", check=True)
        assert read.raw_output[:16] in random.read_bytes()
        async with await trio.open_unix_socket(tmp_path / "p") as stream:
            await talk(machine, stream, "p")
        await machine.run(SEPARATE_NETWORKS)
        await machine.run(TRANSFER)

        await machine.guest.reboot()
        await machine.run(SEPARATE_NETWORKS)
        await machine.run("ping -c 2 192.0.2.2")
        await machine.run("dd if=/dev/vdb of=/dev/vda bs=1M iflag=direct oflag=direct 2>/dev/null")
        assert await difference(source, target, 2 * MIB) == ""
        for function in machine.functions.values():
            check_addresses(function.memory)
        await machine.check_quiet(caplog)


async def test_each_request_maps_its_pages_and_unmaps_them(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, amounts: Amounts
) -> None:
    size = amounts.by_pages
    source, target = tmp_path / "source", tmp_path / "target"
    fill(source, size)
    sparse(target, size)
    devices = [f"blk,path={source},iommu-platform=on", f"blk,path={target},iommu-platform=on"]
    async with booted_from_options(qemu, guest_image, devices, cpus=2, **behind_iommu()) as machine:
        assert "strict mode" in await machine.run("dmesg | grep 'TLB invalidation policy'")
        memories = [function.memory for function in machine.functions.values()]
        idle = [len(memory.regions) for memory in memories]
        with changes(memories[0]) as reads, changes(memories[1]) as writes:
            await copy(machine, "vda", "vdb", size)
        assert await difference(source, target, size) == ""
        for counts in (reads, writes):
            # A DMA_MAP and a DMA_UNMAP for each page of the data at least.
            assert len(counts) >= 2 * size // PAGE
        # Strict invalidation: nothing stays behind.
        assert [len(memory.regions) for memory in memories] == idle

        before = fds_and_tasks()
        for _ in range(3):
            await machine.run("echo virtio1 >/sys/bus/virtio/drivers/virtio_blk/unbind")
            assert memories[1].regions == ()
            await machine.run("echo virtio1 >/sys/bus/virtio/drivers/virtio_blk/bind")
            check_addresses(memories[1])
            await copy(machine, "vdb", "vda", MIB)
        assert [len(memory.regions) for memory in memories] == idle
        assert fds_and_tasks() == before
        await machine.check_quiet(caplog)
    source.unlink()  # pytest keeps the files of three runs
    target.unlink()


@pytest.mark.variant
async def test_thousands_of_pages_at_once(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, amounts: Amounts
) -> None:
    """Requests of 254 pages, all under way before the first is done."""
    # Two mappings of this process for each page: less than the half that is for whoever comes first (`address_space`).
    jobs, pages = amounts.requests_of_pages, 254
    size = jobs * pages * PAGE
    image = tmp_path / "image"
    fill(image, 2 * size)
    backend = ObservedDisk(image)
    async with booted(
        qemu, guest_image, {"blk0": Blk(backend=backend)}, offer=Offer(iommu_platform=True), cpus=2, **behind_iommu()
    ) as machine:
        memory = machine.functions["blk0"].memory
        assert int(await machine.run("cat /sys/block/vda/queue/max_segments")) == pages
        idle = len(memory.regions)
        dd = f"dd bs={pages * PAGE} count=1"
        turns = {
            "read": f"{dd} if=/dev/vda skip=$job iflag=direct of=/tmp/$job",
            "written": f"{dd} if=/tmp/$job of=/dev/vda seek=$(({jobs} + job)) oflag=direct",
        }
        with changes(memory) as counts:
            for turn, command in turns.items():
                backend.gather = jobs
                await machine.run(f"for job in $(seq 0 {jobs - 1}); do {command} 2>/dev/null & done; wait", timeout=300)
                assert backend.gather == 0, f"they were not {turn} at the same time"
        assert max(counts) >= jobs * pages
        assert len(memory.regions) == idle
        with image.open("rb") as file:
            assert file.read(size) == file.read(size)
        await machine.check_quiet(caplog)


async def test_a_guest_that_leaves_its_iommu_in_passthrough(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "image"
    fill(image, 4 * MIB)
    content = image.read_bytes()
    async with booted_from_options(
        qemu, guest_image, [f"blk,path={image},iommu-platform=on"], **behind_iommu(kernel="iommu.passthrough=1")
    ) as machine:
        (function,) = machine.functions.values()
        # I/O addresses are the guest's own: RAM in a few pieces, as without an IOMMU.
        assert max(region.end - region.address for region in function.memory.regions) > 256 * MIB
        digest = await machine.run("dd if=/dev/vda of=/tmp/x bs=1M iflag=direct 2>/dev/null; sha256sum </tmp/x")
        assert digest.split()[0] == hashlib.sha256(content).hexdigest()
        await machine.run("dd if=/tmp/x of=/dev/vda bs=1M skip=2 count=2 oflag=direct 2>/dev/null")
        assert image.read_bytes() == content[2 * MIB :] * 2
        await machine.check_quiet(caplog)


def fds_and_tasks() -> tuple[int, int]:
    """What this process holds; how many mappings neighbouring pages make is another matter."""
    now = held()
    return now["fds"], now["tasks"]


async def copy(machine: Machine, source: str, target: str, size: int) -> None:
    """Four jobs at once, around the guest's page cache."""
    blocks = size // 4 // (256 << 10)
    jobs = "".join(
        f"dd if=/dev/{source} of=/dev/{target} bs=256k count={blocks} skip={job * blocks} seek={job * blocks} "
        f'iflag=direct oflag=direct 2>/dev/null & jobs="$jobs $!"\n'
        for job in range(4)
    )
    await machine.run(f"{jobs} for job in $jobs; do wait $job; done", timeout=1200)
