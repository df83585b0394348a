"""Every identity, each kind of guest memory and of interrupt: a disk, entropy and a console, from one process."""

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio
from support.vm_devices import MIB, Machine, ObservedDisk, booted, slice_of, talk

from vfiouser_virtio import vm
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.transports.identity import Style

pytestmark = pytest.mark.qemu

PORT_NAME = "org.example.port"
# By PCI device: block, entropy, console.
VIRTIO_IDS = {"blk0": 2, "rng0": 4, "console0": 3}


@dataclass(frozen=True)
class Shown:
    """What a guest sees of an identity style; ``%x`` is 0x1040 + the virtio id."""

    ids: str
    subsystem: str
    virtio_vendor: str
    disk_class: str


SHOWN = {
    "default": Shown("1af4:{:04x}", "5000:{:04x}", "0x5000", "0180"),
    "2007": Shown("5000:{:04x}", "5000:{:04x}", "0x5000", "0180"),
    "qemu": Shown("1af4:{:04x}", "1af4:1100", "0x1af4", "0100"),
}


@pytest.mark.parametrize(
    ("ids", "memory", "interrupts", "engine"),
    [
        # Each identity, which is apart from the rest; each kind of memory with each kind of interrupt.
        # The first as in `test_lifecycle`, and what a session of the README shows of it.
        pytest.param("default", "shared", "msix", "vfio-user", marks=pytest.mark.variant),
        ("2007", "private", "intx", "vfio-user"),
        pytest.param("default", "private", "msix", "vfio-user", marks=pytest.mark.variant),
        pytest.param("qemu", "shared", "intx", "vfio-user", marks=pytest.mark.variant),
        ("default", "shared", "msix", "libvfio-user"),
        ("2007", "shared", "intx", "libvfio-user"),
    ],
    indirect=["engine"],
)
async def test_linux_uses_three_devices(
    qemu: vm.Qemu,
    guest_image: vm.GuestImage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ids: Style,
    memory: Literal["shared", "private"],
    interrupts: str,
    engine: str,
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(os.urandom(16 * MIB))
    backend = ObservedDisk(image)
    sockets = [tmp_path / "console.sock", tmp_path / "port.sock"]
    console = Console(chardev=[f"unix:{path}" for path in sockets], name=["", PORT_NAME])
    async with booted(
        qemu,
        guest_image,
        {"blk0": Blk(backend=backend), "rng0": Rng(), "console0": console},
        ids=ids,
        memory=memory,
        append="pci=nomsi" if interrupts == "intx" else "",
    ) as machine:
        await check_identity(machine, SHOWN[ids])
        await check_reads(machine, image)
        await check_writes_and_flush(machine, image, backend)
        await check_discard(machine, image)
        await check_entropy(machine)
        for path, port in zip(sockets, ["hvc0", PORT_NAME], strict=True):
            async with await trio.open_unix_socket(path) as stream:
                await talk(machine, stream, port)
        await check_interrupts(machine, interrupts)
        await machine.check_quiet(caplog)


async def check_identity(machine: Machine, shown: Shown) -> None:
    """The ids of `lspci -nn`, and what the virtio bus shows of them."""
    lspci = await machine.run("lspci -nn")
    assert f"[{shown.disk_class}]" in lspci
    for name, virtio_id in VIRTIO_IDS.items():
        device = 0x1040 + virtio_id
        assert f"[{shown.ids.format(device)}]" in lspci, f"{name} in\n{lspci}"
        match = re.search(rf"^(\S+) .*\[{shown.ids.format(device)}\]", lspci, re.MULTILINE)
        assert match is not None, lspci
        address = match[1]
        files = "subsystem_vendor subsystem_device virtio*/vendor virtio*/device"
        subsystem = await machine.run(f"cd /sys/bus/pci/devices/0000:{address}; cat {files}")
        vendor, model, virtio_vendor, virtio_device = subsystem.split()
        assert f"{vendor[2:]}:{model[2:]}" == shown.subsystem.format(device), name
        assert (virtio_vendor, int(virtio_device, 16)) == (shown.virtio_vendor, virtio_id), name


async def check_reads(machine: Machine, image: Path) -> None:
    """What the host has in the file, read by requests of several sizes that go around the guest's page cache."""
    assert await machine.run("blockdev --getsize64 /dev/vda") == str(image.stat().st_size)
    # Block size, first block, blocks: together 5 MiB, up to the end of the disk.
    reads = [(512, 7, 40), (4096, 100, 64), (65536, 9, 16), (MIB, 12, 4)]
    commands = [f"dd if=/dev/vda bs={bs} skip={at} count={n} iflag=direct | sha256sum" for bs, at, n in reads]
    sums = (await machine.run("exec 2>/dev/null\n" + "\n".join(commands))).replace("-", "").split()
    for (size, at, count), digest in zip(reads, sums, strict=True):
        assert digest == hashlib.sha256(slice_of(image, at * size, count * size)).hexdigest(), f"blocks of {size}"


async def check_writes_and_flush(machine: Machine, image: Path, backend: ObservedDisk) -> None:
    """What the guest writes is in the host's file, and nothing else has changed; its fsync is one of ours."""
    expected = bytearray(image.read_bytes())
    # The last MiB of the disk, copied to other places by requests of several sizes.
    data = bytes(expected[-MIB:])
    writes = [(512, 3, 40), (4096, 50, 32), (65536, 10, 8), (MIB, 3, 1)]
    commands = ["dd if=/dev/vda of=/tmp/data bs=1M skip=15"]
    commands += [f"dd if=/tmp/data of=/dev/vda bs={bs} seek={at} count={n} oflag=direct" for bs, at, n in writes]
    await machine.run("exec 2>/dev/null\n" + "\n".join(commands))
    for size, at, count in writes:
        expected[size * at : size * (at + count)] = data[: size * count]
    assert first_difference(expected, image.read_bytes()) is None

    flushes = backend.flushes
    await machine.run("dd if=/tmp/data of=/dev/vda bs=64k seek=100 count=4 conv=fsync,notrunc 2>/dev/null")
    assert backend.flushes > flushes
    expected[100 << 16 : 104 << 16] = data[: 4 << 16]
    assert first_difference(expected, image.read_bytes()) is None


def first_difference(expected: bytes | bytearray, found: bytes) -> str | None:
    """Where two disks differ, in few words: pytest would print both."""
    if expected == found:
        return None
    at = next(at for at, (one, other) in enumerate(itertools.zip_longest(expected, found)) if one != other)
    return f"{len(expected)} and {len(found)} bytes, differ at {at:#x}"


async def check_discard(machine: Machine, image: Path) -> None:
    """Space that the guest gives back is a hole in the host's file."""
    used, offset, length = image.stat().st_blocks * 512, 8 * MIB, 3 * MIB
    await machine.run(f"blkdiscard -o {offset} -l {length} /dev/vda")
    assert used - image.stat().st_blocks * 512 == length
    assert slice_of(image, offset, length) == bytes(length)
    assert slice_of(image, offset + length, 4096) != bytes(4096), "more was discarded than asked for"


async def check_entropy(machine: Machine) -> None:
    """Random bytes come through /dev/hwrng, other ones each time."""
    assert await machine.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    first, second = [(await machine.guest.run("head -c 4096 /dev/hwrng", check=True)).raw_output for _ in range(2)]
    assert len(first) == len(second) == 4096
    assert first != second
    # Of 4096 random bytes, no value is missing with a probability of 1 - 256 * (255/256)**4096, so 99.997 %.
    assert len(set(first)) > 250
    assert len(set(second)) > 250


async def check_interrupts(machine: Machine, kind: str) -> None:
    """Linux uses the kind of interrupt that it should, and each device's did come."""
    lines = [line.split() for line in (await machine.run("grep virtio /proc/interrupts")).splitlines()]
    assert {"PCI-MSIX" if "PCI-MSIX" in line[2] else "INTx" for line in lines} == {
        "msix": {"PCI-MSIX"},
        "intx": {"INTx"},
    }[kind]
    counts = dict.fromkeys(["virtio0", "virtio1", "virtio2"], 0)
    for line in lines:
        # "virtio0-req.0"; devices that share a line: "virtio0, virtio1"
        for name in re.findall(r"virtio\d", " ".join(line)):
            counts[name] += int(line[1])
    assert all(counts.values()), counts
