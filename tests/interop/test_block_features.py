"""What a disk can do beside reading and writing, as a Linux guest sees it."""

import hashlib
import os
import random
import re
from pathlib import Path

import pytest
import trio
from support.vm_devices import MIB, Machine, ObservedDisk, booted, slice_of, sparse

from vfiouser_virtio import vm
from vfiouser_virtio.devices.blk import Blk

pytestmark = pytest.mark.qemu

TOPOLOGY = ["logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "max_segments"]


class Disks:
    """Six disks of one guest, vda to vdf: a boot takes longer than all that is done to them."""

    def __init__(self, folder: Path) -> None:
        self.read_only = folder / "read-only"
        self.read_only.write_bytes(os.urandom(MIB))
        self.read_only.chmod(0o400)
        self.read_only_before = self.read_only.read_bytes(), self.read_only.stat().st_mtime_ns
        self.resized_image = sparse(folder / "resized", 8 * MIB)
        self.resized = Blk(path=self.resized_image)
        self.cached_backend = ObservedDisk(sparse(folder / "cached", 8 * MIB))
        self.cached = Blk(backend=self.cached_backend)
        self.trimmed_image = folder / "trimmed"
        self.trimmed_image.write_bytes(os.urandom(64 * MIB))
        self.trimmed_backend = ObservedDisk(self.trimmed_image)
        self.broken_image = folder / "broken"
        self.broken_image.write_bytes(os.urandom(8 * MIB))
        self.broken_backend = ObservedDisk(self.broken_image)
        self.devices = {
            "blk0": Blk(path=self.read_only, readonly=True),
            "blk1": Blk(
                size=16 * MIB,
                serial="a serial of 20 bytes",
                logical_block_size=4096,
                physical_block_size=16384,
                min_io_size=32768,
                opt_io_size=MIB,
                seg_max=32,
            ),
            "blk2": self.resized,
            "blk3": self.cached,
            "blk4": Blk(backend=self.trimmed_backend),
            "blk5": Blk(backend=self.broken_backend),
        }


async def test_what_disks_can_do(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disks = Disks(tmp_path)
    async with booted(qemu, guest_image, disks.devices) as machine:
        await check_read_only(machine, disks)
        await check_serial_and_topology(machine)
        await check_live_resize(machine, disks)
        await check_write_cache_toggle(machine, disks)
        await check_discard_fstrim_and_write_zeroes(machine, disks)
        await machine.check_quiet(caplog)
        await check_host_errors_are_the_guests_and_it_goes_on(machine, disks, caplog)
    assert (disks.read_only.read_bytes(), disks.read_only.stat().st_mtime_ns) == disks.read_only_before


async def check_read_only(machine: Machine, disks: Disks) -> None:
    assert await machine.run("cat /sys/block/vda/ro /sys/block/vdb/ro") == "1\n0"
    refused = await machine.guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc")
    assert refused.status != 0
    assert "Operation not permitted" in refused.output
    # Without Linux's own check, too.
    await machine.run("blockdev --setrw /dev/vda || true")
    assert (await machine.guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct")).status != 0
    digest = hashlib.sha256(disks.read_only_before[0]).hexdigest()
    assert await machine.run("sha256sum /dev/vda") == f"{digest}  /dev/vda"


async def check_serial_and_topology(machine: Machine) -> None:
    assert await machine.run("cat /sys/block/vdb/serial") == "a serial of 20 bytes"
    assert await machine.run("cat /sys/block/vda/serial") == ""
    shown = await machine.run("cd /sys/block/vdb/queue; cat " + " ".join(TOPOLOGY))
    assert dict(zip(TOPOLOGY, map(int, shown.split()), strict=True)) == {
        "logical_block_size": 4096,
        "physical_block_size": 16384,
        "minimum_io_size": 32768,
        "optimal_io_size": MIB,
        "max_segments": 32,
    }


async def check_live_resize(machine: Machine, disks: Disks) -> None:
    image, disk = disks.resized_image, disks.resized

    async def check_size(size: int) -> None:
        condition = f"[ $(cat /sys/block/vdc/size) = {size // 512} ]"
        await machine.run(f"for i in $(seq 100); do {condition} && break; sleep 0.1; done; {condition}")
        messages = [line for line in (await machine.run("dmesg")).splitlines() if "new size" in line]
        assert f"[vdc] new size: {size // 512} 512-byte logical blocks" in messages[-1]

    assert await machine.run("cat /sys/block/vdc/size") == str(8 * MIB // 512)
    await disk.resize(24 * MIB)
    await check_size(24 * MIB)
    assert image.stat().st_size == 24 * MIB
    await machine.run("mkfs.ext2 -q /dev/vdc && mount /dev/vdc /mnt")
    await machine.run("sha256sum /bin/busybox >/mnt/sum && umount /mnt")
    # From outside: the device looks by itself.
    os.truncate(image, 32 * MIB)
    await check_size(32 * MIB)
    await machine.run("dd if=/dev/zero of=/dev/vdc bs=1M seek=31 count=1 oflag=direct 2>/dev/null")
    await machine.run("mount /dev/vdc /mnt && sha256sum -c -s /mnt/sum && umount /mnt")
    await disk.resize(16 * MIB)
    await check_size(16 * MIB)
    beyond = await machine.guest.run("dd if=/dev/vdc of=/dev/null bs=1M skip=16 count=1 iflag=direct")
    assert "0+0 records in" in beyond.output


async def check_write_cache_toggle(machine: Machine, disks: Disks) -> None:
    backend, disk = disks.cached_backend, disks.cached
    direct = "dd if=/dev/zero of=/dev/vdd bs=4k count=8 oflag=direct 2>/dev/null"
    flushed = "dd if=/dev/zero of=/dev/vdd bs=4k count=8 conv=fsync,notrunc 2>/dev/null"

    async def flushes(command: str) -> int:
        before = backend.flushes
        await machine.run(command)
        return backend.flushes - before

    async def switch_to(kind: str) -> None:
        await machine.run(f"echo {kind} >/sys/block/vdd/cache_type")
        assert await machine.run("cd /sys/block/vdd; cat cache_type queue/write_cache") == f"{kind}\n{kind}"

    assert await machine.run("cat /sys/block/vdd/cache_type") == "write back"
    assert await flushes(direct) == 0
    assert await flushes(flushed) == 1

    await switch_to("write through")
    assert disk.config["wce"] == 0
    # Now it is for us to make each of the 8 writes durable.
    assert await flushes(direct) == 8
    assert await flushes(flushed) >= 1

    await switch_to("write back")
    assert disk.config["wce"] == 1
    assert await flushes(direct) == 0


async def check_discard_fstrim_and_write_zeroes(machine: Machine, disks: Disks) -> None:
    image, backend = disks.trimmed_image, disks.trimmed_backend

    def used() -> int:
        return image.stat().st_blocks * 512

    assert used() >= 64 * MIB
    # Without a discard by mke2fs itself; tables that it has no data for are zeroed by WRITE_ZEROES.
    await machine.run("mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/vde")
    assert backend.zeroed > 0
    await machine.run("mount /dev/vde /mnt && cp /bin/busybox /mnt")
    trimmed = await machine.run("fstrim -v /mnt")
    assert used() < 20 * MIB, trimmed
    await machine.run("echo 3 >/proc/sys/vm/drop_caches; cmp /bin/busybox /mnt/busybox && umount /mnt")
    await machine.run("mount /dev/vde /mnt && cmp /bin/busybox /mnt/busybox && umount /mnt")
    checked = await trio.run_process([*vm.host_tool("e2fsck"), "-fn", str(image)], capture_stdout=True, check=False)
    assert checked.returncode == 0, checked.stdout.decode()
    await machine.run("blkdiscard /dev/vde")
    assert used() == 0
    assert image.stat().st_size == 64 * MIB


async def check_host_errors_are_the_guests_and_it_goes_on(
    machine: Machine, disks: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    image, backend = disks.broken_image, disks.broken_backend
    content = image.read_bytes()
    # Only now: Linux has looked for partitions.
    backend.broken = range(4 * MIB, 5 * MIB)

    async def dd(arguments: str) -> tuple[int, str]:
        result = await machine.guest.run(f"dd bs=1M {arguments}")
        return result.status, result.output

    status, output = await dd("if=/dev/vdf of=/dev/null iflag=direct")
    assert status != 0
    assert "Input/output error" in output
    status, output = await dd("if=/dev/zero of=/dev/vdf seek=4 count=1 oflag=direct")
    assert status != 0
    assert "Input/output error" in output
    status, output = await dd("if=/dev/zero of=/dev/vdf seek=4 count=1 conv=fsync,notrunc")
    assert status != 0, "fsync must tell of a write that failed"
    assert "Input/output error" in output
    assert image.read_bytes() == content

    after = hashlib.sha256(content[5 * MIB :]).hexdigest()
    assert (await machine.run("dd if=/dev/vdf bs=1M skip=5 iflag=direct 2>/dev/null | sha256sum")).split()[0] == after
    backend.broken = range(0)
    assert (await dd("if=/dev/zero of=/dev/vdf seek=4 count=1 oflag=direct"))[0] == 0
    assert slice_of(image, 4 * MIB, MIB) == bytes(MIB)
    complaints = await machine.complaints()
    assert complaints
    assert all(re.search(r"I/O error, dev vdf|Buffer I/O error on dev vdf", line) for line in complaints)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    # Each kind once, however often it happened.
    assert len(logged) == 2
    assert re.search(r"IN at offset 0x4\w+ failed on the host: .*the test has broken this part", logged[0])
    assert re.search(r"OUT at offset 0x4\w+ failed on the host: .*the test has broken this part", logged[1])


async def test_64_requests_at_once(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """64 jobs write a block each, at random places, and read it back; none is done before all have been asked for."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 * MIB))
    expected = bytearray(image.read_bytes())
    backend = ObservedDisk(image)
    jobs, block = 64, 16384
    # From the first half of the disk to the second, some blocks apart so that the kernel merges none.
    targets = [512 + 7 * place for place in random.Random(64).sample(range(jobs), jobs)]
    async with booted(qemu, guest_image, {"blk0": Blk(backend=backend, num_queues=2)}, cpus=2) as machine:

        async def all_at_once(*commands: str) -> None:
            backend.gather = jobs
            await machine.run("\n".join(["exec 2>/dev/null", *(f"{command} &" for command in commands), "wait"]))
            assert backend.gather == 0, "they were not under way at the same time"

        await machine.run(f"dd if=/dev/vda of=/tmp/source bs={block} count={jobs} iflag=direct 2>/dev/null")
        dd = f"dd bs={block} count=1"
        await all_at_once(
            *(
                f"{dd} if=/tmp/source of=/dev/vda skip={job} seek={target} oflag=direct"
                for job, target in enumerate(targets)
            )
        )
        await all_at_once(
            *(f"{dd} if=/dev/vda of=/tmp/back-{job} skip={target} iflag=direct" for job, target in enumerate(targets))
        )
        back = " ".join(f"/tmp/back-{job}" for job in range(jobs))
        await machine.run(f"cat {back} | cmp - /tmp/source")
        # One writer that leaves the order to the kernel.
        await machine.run("dd if=/tmp/source of=/dev/vda bs=64k seek=32 conv=fsync,notrunc 2>/dev/null")
        await machine.check_quiet(caplog)
    source = expected[:MIB]
    for job, target in enumerate(targets):
        expected[target * block : (target + 1) * block] = source[job * block : (job + 1) * block]
    expected[2 * MIB : 3 * MIB] = source
    assert expected == image.read_bytes()
