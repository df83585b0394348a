"""User space of the Linux guest: busybox, lspci, mke2fs and an agent, as an initramfs or as the tree of a root disk."""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiouser_virtio.protocols.virtio.device_types import linux_aliases, linux_modules
from vfiouser_virtio.vm import debian, modules, newc, programs
from vfiouser_virtio.vm.kernel import Kernel, find_kernel

_SCRIPTS = Path(__file__).parent / "guest"

# Drivers of every virtio device that Linux has one for, and what their users need; a kernel without one is fine.
# Only virtio_pci is loaded at boot: the others when a device asks for them, or the kernel itself (`fs-9p`).
DRIVERS = (
    "virtio_pci", *linux_modules(), "ext4", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "crc32c_generic",
)  # fmt: skip

# busybox's applets that our own files take the place of.
_OURS = frozenset({"init", "linuxrc", "busybox", "mke2fs", "dpkg", "dpkg-deb"})

# The vendors of pci.ids that a guest of ours can meet; the whole file would take lspci a second under TCG.
_PCI_VENDORS = ("1af4", "1b36", "1234", "8086", "1d1d", "5000")

KEPT = 12
"""Initramfs files that stay in the cache, of up to 30 MB each."""
_IN_USE = 3600.0  # seconds after its last use in which one is certainly read


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Boot image: a kernel, and an initramfs whose agent answers on the second serial port."""

    kernel: Kernel
    initramfs: Path


def guest_image(
    kernel: str | None = None, *, kernel_modules: Path | None = None, more_modules: Sequence[str] = ()
) -> GuestImage:
    """The small guest, fetched and built at the first call. `kernel` is a Debian suite or a file (see `find_kernel`).

    `more_modules` are drivers beside those of virtio, which the guest loads when it boots, in this order. Debian's
    kernel for virtual machines has few: `trixie:amd64` has all. What a kernel has built in may be named, too.
    Raises ConfigError when something cannot be fetched, the kernel is not usable, or it has no module of that name.
    """
    found = find_kernel(kernel, modules=kernel_modules)
    tools = fetch_tools()
    target = debian.cache_dir() / f"initramfs-{found.version}-{_digest(found, tools, more_modules)}.cpio"
    with contextlib.suppress(FileNotFoundError):
        os.utime(target)  # when it was last used
        return GuestImage(found, target)
    if more_modules:
        modules.check_names(found.modules, found.version, more_modules)
    debian.progress(f"building the guest's initramfs for Linux {found.version}")
    archive = newc.pack(_tree(found, tools, more_modules))
    # Under another name first: a run that is interrupted, or one at the same time, never shows half a file.
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as scratch:
        scratch.write(archive)
    os.replace(scratch.name, target)
    forget_old(target.parent)
    return GuestImage(found, target)


def forget_old(folder: Path) -> None:
    """Remove initramfs files of a cache but the `KEPT` that were used last, and any that was used in the last hour.

    There is one for each kernel, list of modules and state of our own files; QEMU may be about to read a recent one.
    What an interrupted run has left of one is removed, too.
    """
    used: list[tuple[float, Path]] = []
    for path in (*folder.glob("initramfs-*.cpio"), *folder.glob(".initramfs-*.cpio.*")):
        with contextlib.suppress(FileNotFoundError):  # another run does the same
            used.append((path.stat().st_mtime, path))
    used.sort(reverse=True)
    whole = [path for _, path in used if not path.name.startswith(".")][:KEPT]
    for when, path in used:
        if path not in whole and when < time.time() - _IN_USE:
            path.unlink(missing_ok=True)


def build_root_tree(folder: Path, image: GuestImage) -> None:
    """Lay out, in an empty folder, a root file system with the guest's tools and agent, for `mke2fs -d folder`.

    A guest booted with `root=/dev/vda rw` has it as its root, and answers as it does in the initramfs.
    """
    newc.write_tree(_tree(image.kernel, fetch_tools()), folder)


def fetch_tools() -> Path:
    """The unpacked tree with busybox, pciutils and e2fsprogs. Raises ConfigError when it cannot be fetched."""
    return debian.fetch(
        "guest-tools", ["busybox-static", "pciutils", "e2fsprogs", "ethtool"], what="the guest's programs", megabytes=9
    )


def _digest(kernel: Kernel, tools: Path, more_modules: Sequence[str]) -> str:
    """Changes whenever the tree would: with our files, the tools, the kernel's modules."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(newc.__file__), Path(modules.__file__), *sorted(_SCRIPTS.iterdir())):
        digest.update(path.read_bytes())
    digest.update(f"{tools}\n{kernel.modules}\n{DRIVERS}\n{linux_aliases()}\n{list(more_modules)}\n".encode())
    if kernel.modules is not None:
        digest.update((kernel.modules / "modules.dep").read_bytes())
    return digest.hexdigest()[:12]


def _tree(kernel: Kernel, tools: Path, more_modules: Sequence[str] = ()) -> list[newc.Entry]:
    entries = [newc.directory(path) for path in ("dev", "proc", "sys", "run", "mnt", "newroot", "root", "var/log")]
    entries += [
        newc.directory("tmp", 0o1777),
        # The kernel opens it for /init before devtmpfs is mounted.
        newc.char_device("dev/console", 5, 1),
        newc.file("init", _script("init"), 0o755),
        newc.file("sbin/init", _script("rc"), 0o755),
        newc.file("sbin/agent", _script("agent"), 0o755),
        newc.file("sbin/console-shell", _script("console-shell"), 0o755),
        newc.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        newc.file("etc/group", b"root:x:0:\n"),
        newc.file("etc/udhcpc/default.script", _script("udhcpc"), 0o755),
        newc.file("etc/hosts", b"127.0.0.1 localhost guest\n"),
        # What `mount` without -t tries; the kernel loads the module of each.
        newc.file("etc/filesystems", b"ext4\nvfat\n"),
        newc.file("etc/modules", "".join(f"{name}\n" for name in more_modules).encode()),
        newc.symlink("etc/mtab", "/proc/mounts"),
    ]
    entries += _busybox(tools)
    entries += _programs(tools, {"lspci": "usr/bin/lspci", "mke2fs": "usr/sbin/mke2fs", "ethtool": "usr/sbin/ethtool"})
    entries += [newc.symlink(f"usr/sbin/mkfs.{kind}", "mke2fs") for kind in ("ext2", "ext3", "ext4")]
    entries.append(newc.file("etc/mke2fs.conf", (tools / "etc/mke2fs.conf").read_bytes()))
    entries.append(
        newc.file("usr/share/misc/pci.ids", pci_names((tools / "usr/share/misc/pci.ids").read_text("utf-8")))
    )
    if kernel.modules is not None:
        entries += modules.module_tree(kernel.modules, kernel.version, [*DRIVERS, *more_modules], linux_aliases())
    return entries


def _script(name: str) -> bytes:
    return (_SCRIPTS / name).read_bytes()


def _busybox(tools: Path) -> list[newc.Entry]:
    program = programs.find_program(tools, "busybox")
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    applets = [newc.symlink(f"bin/{name}", "busybox") for name in listed if name not in _OURS]
    # The kernel calls /sbin/modprobe.
    return [
        newc.file("bin/busybox", program.read_bytes(), 0o755),
        *applets,
        newc.symlink("sbin/modprobe", "../bin/busybox"),
    ]


def _programs(tools: Path, wanted: dict[str, str]) -> list[newc.Entry]:
    """Programs of the tree (name: path in the guest), and each library once."""
    entries: list[newc.Entry] = []
    found: dict[str, Path] = {}
    for name, path in wanted.items():
        program = programs.find_program(tools, name)
        found |= programs.libraries(tools, program)
        entries.append(newc.file(path, program.read_bytes(), 0o755))
    # Every program names its loader as /lib64/…; the loader searches lib/x86_64-linux-gnu.
    folders = {name: "lib64" if name.startswith("ld-linux") else "lib/x86_64-linux-gnu" for name in found}
    return entries + [newc.file(f"{folders[name]}/{name}", file.read_bytes(), 0o755) for name, file in found.items()]


def pci_names(text: str) -> bytes:
    """The part of pci.ids that names our vendors' devices, and all device classes."""
    kept: list[str] = []
    keep = False
    for line in text.splitlines(keepends=True):
        if match := re.match(r"(?:([0-9a-f]{4})|C [0-9a-f]{2})  ", line):
            keep = match[1] is None or match[1] in _PCI_VENDORS
        if keep and not line.startswith("#"):
            kept.append(line)
    return "".join(kept).encode()
