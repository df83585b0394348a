"""Kernel of the Linux guest: Debian's by suite, fetched into the cache, or a file of the user's."""

import gzip
import lzma
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import debian, programs

# Debian's kernel for virtual machines: a third of the generic one's size; virtio console, file systems built in.
DEFAULT_FLAVOUR = "cloud-amd64"

# Linux, Documentation/arch/x86/boot.rst: offsets into a bzImage.
_SETUP_SECTS = 0x1F1
_BOOT_MAGIC = (0x202, b"HdrS")
_KERNEL_VERSION = 0x20E
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C

# The ELF note that QEMU looks for in an uncompressed kernel: XEN_ELFNOTE_PHYS32_ENTRY (18), of "Xen", 4 or 8 bytes.
_PVH_NOTE = re.compile(rb"\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0")


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernel: `image` is what QEMU's -kernel gets; `modules` the folder that has modules.dep, None without modules.

    `bzimage` is what boot loaders get; None for a file of the user's that is none.
    """

    version: str
    image: Path
    modules: Path | None
    bzimage: Path | None = None


def find_kernel(wanted: str | None = None, *, modules: Path | None = None) -> Kernel:
    """The kernel that the user wants: a file, or a Debian suite with an optional flavour (`trixie`, `sid:amd64`).

    None is the default suite's. Raises ConfigError for a file that is no kernel or a suite that cannot be fetched.
    """
    if wanted is not None and ("/" in wanted or Path(wanted).is_file()):
        return kernel_from_file(Path(wanted), modules)
    suite, _, flavour = (wanted or debian.DEFAULT_SUITE).partition(":")
    return fetch_kernel(suite, flavour or DEFAULT_FLAVOUR)


def fetch_kernel(suite: str = debian.DEFAULT_SUITE, flavour: str = DEFAULT_FLAVOUR) -> Kernel:
    """Debian's kernel of a suite. Raises ConfigError when it cannot be fetched."""
    # kmod because Debian runs depmod at install time, zstd because Python before 3.14 cannot unpack what trixie uses.
    packages = [f"linux-image-{flavour}", "kmod", "zstd"]
    root = debian.fetch(
        f"kernel-{flavour}", packages, suite=suite, what="a guest kernel", megabytes=56, finish=_finish_kernel
    )
    return _kernel_in(root)


def kernel_from_file(image: Path, modules: Path | None = None) -> Kernel:
    """A kernel of the user's own, with the modules folder given or found where distributions keep it.

    Raises ConfigError when the file is no x86 kernel, or `modules` has no modules.dep.
    """
    try:
        with open(image, "rb") as file:
            head = file.read(0x8000)
    except OSError as error:
        raise ConfigError(f"kernel {image}: {error.strerror}") from None
    if not head.startswith(b"\x7fELF") and not _is_bzimage(head):
        raise ConfigError(f"{image} is not an x86 Linux kernel (neither a bzImage nor an ELF vmlinux)")
    version = _bzimage_version(head)
    if modules is not None and not (modules / "modules.dep").is_file():
        raise ConfigError(f"{modules} has no modules.dep: run depmod, or name the folder that has it")
    if modules is None and version:
        places = (image.parent, image.parent.parent / "usr/lib/modules" / version, Path("/lib/modules") / version)
        modules = next((place for place in places if (place / "modules.dep").is_file()), None)
    return Kernel(version or image.name, image, modules, image if _is_bzimage(head) else None)


def _kernel_in(root: Path) -> Kernel:
    modules = _modules_dir(root)
    unpacked, bzimage = root / "vmlinux", _vmlinuz(root, modules)
    return Kernel(modules.name, unpacked if unpacked.exists() else bzimage, modules, bzimage)


def _modules_dir(root: Path) -> Path:
    # bookworm has lib/modules, trixie and later usr/lib/modules.
    for parent in ("usr/lib/modules", "lib/modules"):
        if found := sorted((root / parent).glob("*/kernel")):
            return found[-1].parent
    raise ConfigError(f"{root} has no kernel modules: remove that folder and run again")


def _vmlinuz(root: Path, modules: Path) -> Path:
    # From 7.x on Debian's kernel package is split, and the image lies with its modules.
    for path in (root / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
        if path.is_file():
            return path
    raise ConfigError(f"{root} has no kernel image: remove that folder and run again")


def _finish_kernel(root: Path) -> None:
    """What Debian does at install time (depmod), and an unpacked image, which boots 1.2 s faster under TCG."""
    modules = _modules_dir(root)
    # depmod looks below BASE/lib/modules, or BASE/usr/lib/modules where Debian built it so.
    for base in (modules.parents[2], root):
        debian.run([*programs.argv(root, "kmod", called="depmod"), "-b", str(base), modules.name], "depmod")
        if (modules / "modules.dep").is_file():
            break
    unpacked = unpack_bzimage(_vmlinuz(root, modules).read_bytes(), root)
    if unpacked is not None and _PVH_NOTE.search(unpacked):
        (root / "vmlinux").write_bytes(unpacked)


def unpack_bzimage(image: bytes, root: Path) -> bytes | None:
    """The ELF kernel inside a bzImage, None when its compression is not known; `root` is a tree that has zstd."""
    if not _is_bzimage(image):
        return None
    start = (image[_SETUP_SECTS] + 1) * 512 + _u32(image, _PAYLOAD_OFFSET)
    # Linux appends the unpacked size, which is no part of the compressed stream.
    payload = image[start : start + _u32(image, _PAYLOAD_LENGTH) - 4]
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        zstd = [*programs.argv(root, "zstd"), "-dc"]
        return subprocess.run(zstd, input=payload, capture_output=True, check=True).stdout
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload)
    return None


def _is_bzimage(image: bytes) -> bool:
    offset, magic = _BOOT_MAGIC
    return image[offset : offset + len(magic)] == magic


def _bzimage_version(head: bytes) -> str:
    """The release in a bzImage's header (`6.12.107+deb13-cloud-amd64`), empty for an ELF file."""
    if not _is_bzimage(head):
        return ""
    start = int.from_bytes(head[_KERNEL_VERSION : _KERNEL_VERSION + 2], "little") + 0x200
    return head[start:].split(b"\0", 1)[0].split(b" ", 1)[0].decode("ascii", "replace")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")
