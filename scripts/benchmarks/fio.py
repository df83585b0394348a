"""fio, the usual load generator for disks, from Debian and inside the guest: its files, command line and results."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vfiouser_virtio.vm import GuestImage, VmError, debian, newc, programs

# It links Ceph and the like, which are never used but must be there.
_MEGABYTES = 49

PREFIX = "fio --output-format=terse --terse-version=3 --thread --gtod_reduce=1 --time_based"
"""How its command line begins."""


@dataclass(frozen=True, slots=True)
class FioLoad:
    """Load for fio: `rw` is its word for it."""

    rw: Literal["read", "write", "randread", "randwrite"]
    block_kib: int
    depth: int

    @property
    def name(self) -> str:
        """As people say it."""
        size = f"{self.block_kib} KiB" if self.block_kib < 1024 else f"{self.block_kib >> 10} MiB"
        return f"{self.rw} {size} QD{self.depth}"


@dataclass(frozen=True, slots=True)
class FioResult:
    """Result of one job."""

    requests: int
    per_second: float


def fetch() -> Path:
    """The folder with fio and all it needs, from the cache. Raises ConfigError when it cannot be fetched."""
    return debian.fetch("fio", ["fio"], what="fio", megabytes=_MEGABYTES, finish=_link_private_libraries)


def image_with_fio(image: GuestImage, folder: Path) -> GuestImage:
    """The guest with fio in it; the initramfs is put into `folder`. Raises ConfigError when fio cannot be fetched."""
    root = fetch()
    program = programs.find_program(root, "fio")
    entries = [newc.file("usr/bin/fio", program.read_bytes(), 0o755)]
    for name, file in programs.libraries(root, program).items():
        if not name.startswith("ld-linux"):
            entries.append(newc.file(f"lib/x86_64-linux-gnu/{name}", file.read_bytes(), 0o755))
    target = folder / "initramfs-fio.cpio"
    # The kernel unpacks one archive after the other (Linux, driver-api/early-userspace/buffer-format).
    target.write_bytes(image.initramfs.read_bytes() + newc.pack(entries))
    return GuestImage(image.kernel, target)


def _link_private_libraries(root: Path) -> None:
    """Ceph's programs find their common library by an absolute path, which is none in a tree of our own."""
    for library in root.glob("usr/lib/*/ceph/libceph-common.so.*"):
        (library.parent.parent / library.name).symlink_to(f"ceph/{library.name}")


def command(load: FioLoad, disks: Mapping[str, str], order: Sequence[str], seconds: float) -> str:
    """A shell command that puts the load on one disk after another; `disks` are names and device files."""
    words = [*PREFIX.split(), "--ioengine=libaio", "--direct=1", "--norandommap", f"--runtime={round(seconds * 1e3)}ms"]
    words += [f"--rw={load.rw}", f"--bs={load.block_kib}k", f"--iodepth={load.depth}"]
    for name in order:
        words += [f"--name={name}", "--stonewall", f"--filename={disks[name]}"]
    return shlex.join(words)


def results(load: FioLoad, output: str) -> dict[str, FioResult]:
    """By name of the disk. Raises VmError where fio failed."""
    found = {}
    for line in output.splitlines():
        # fio(1), "TERSE OUTPUT", version 3: 5 fields about the job, 41 about its reads, as many about its writes.
        fields = line.split(";")
        if fields[0] != "3" or len(fields) < 88:
            continue
        if fields[4] != "0":
            raise VmError(f"fio: error {fields[4]} at {fields[2]}:\n{output}")
        reads, writes = (fields[start : start + 4] for start in (5, 46))
        # KiB in all, KiB/s, requests/s, ms.
        kib, _, per_second, _ = writes if float(writes[3]) else reads
        found[fields[2]] = FioResult(int(kib) // load.block_kib, float(per_second))
    if not found:
        raise VmError(f"fio gave no result:\n{output}")
    return found
