"""A root file system on our disk: made on the host, used by the guest over a reboot, then looked into on the host."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import trio
from support.vm_devices import MIB, Machine, booted, sparse

from vfiouser_virtio import vm
from vfiouser_virtio.devices.blk import Blk

pytestmark = pytest.mark.qemu

# Files from some bytes to more than one request can carry, and the sums of all.
WRITE_FILES = r"""
mkdir -p /srv/files
cd /srv/files
for size in 1 100 4095 4096 70000 300000 2000000; do
    head -c $size /dev/urandom >%(prefix)s-$size
done
sha256sum %(prefix)s-* >>/srv/sums
"""


@pytest.fixture(scope="module")
def made_on_host(guest_image: vm.GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with an ext4 root file system."""
    folder = tmp_path_factory.mktemp("root")
    tree = folder / "tree"
    tree.mkdir()
    vm.build_root_tree(tree, guest_image)
    image = sparse(folder / "image", 64 * MIB)
    subprocess.run([*vm.host_tool("mkfs.ext4"), "-q", "-d", str(tree), str(image)], check=True)
    return image


@pytest.mark.parametrize(("queues", "memory"), [pytest.param(1, "private", marks=pytest.mark.variant), (2, "shared")])
async def test_root_file_system_survives_a_reboot(
    qemu: vm.Qemu,
    guest_image: vm.GuestImage,
    made_on_host: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    queues: int,
    memory: Literal["shared", "private"],
) -> None:
    image = tmp_path / "image"
    shutil.copy(made_on_host, image)
    disk = Blk(path=image, num_queues=queues)
    async with booted(
        qemu, guest_image, {"blk0": disk}, memory=memory, cpus=queues, append="root=/dev/vda rw"
    ) as machine:
        assert "/dev/vda on / type ext4 (rw" in await machine.run("mount")
        assert await machine.run("ls -d /sys/block/vda/mq/*/ | wc -l") == str(queues)
        await machine.run(WRITE_FILES % {"prefix": "first"})
        await check_queues_in_use(machine, queues)
        await machine.guest.reboot()
        assert "/dev/vda on / type ext4 (rw" in await machine.run("mount")
        await machine.run("cd /srv/files && sha256sum -c -s /srv/sums")
        await machine.run(WRITE_FILES % {"prefix": "second"})
        sums = await machine.run("cat /srv/sums")
        await machine.check_quiet(caplog)
        assert await machine.guest.poweroff() == 0

    checked = await trio.run_process([*vm.host_tool("e2fsck"), "-fn", str(image)], capture_stdout=True, check=False)
    assert checked.returncode == 0, checked.stdout.decode()
    assert len(sums.splitlines()) == 14
    for line in sums.splitlines():
        digest, name = line.split()
        content = await debugfs(image, f"cat /srv/files/{name}")
        assert len(content) == int(name.partition("-")[2])
        assert hashlib.sha256(content).hexdigest() == digest, name


async def check_queues_in_use(machine: Machine, queues: int) -> None:
    """Each CPU's requests go through a queue, and an interrupt, of its own."""
    for cpu in range(queues):
        await machine.run(f"taskset -c {cpu} dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct 2>/dev/null")
    lines = re.findall(
        r"^ *\d+:([\d ]+) .* virtio0-req\.(\d)$", await machine.run("cat /proc/interrupts"), re.MULTILINE
    )
    assert [int(number) for _, number in lines] == list(range(queues))
    for counts, number in lines:
        assert sum(map(int, counts.split())) >= 20, f"request queue {number}"


async def debugfs(image: Path, request: str) -> bytes:
    """What debugfs(8) prints."""
    command = [*vm.host_tool("debugfs"), "-R", request, str(image)]
    return (await trio.run_process(command, capture_stdout=True, capture_stderr=True)).stdout
