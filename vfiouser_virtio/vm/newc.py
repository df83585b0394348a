"""Writer of "newc" cpio archives (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), for an initramfs.

The same entries always give the same bytes: no times, no owners but root, inode numbers in order.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """File of a tree: `path` has no leading slash, `mode` its type bits, `data` is the content or the target."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def directory(path: str, permissions: int = 0o755) -> Entry:
    """An empty folder."""
    return Entry(path, stat.S_IFDIR | permissions)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def char_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(path, stat.S_IFCHR | permissions, device=(major, minor))


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each after the folders it lives in; a folder that is missing is added, as the kernel adds none.

    Raises ValueError for a path that is absolute, has `..`, or occurs twice as anything but a folder.
    """
    tree: dict[str, Entry] = {}
    for entry in entries:
        pure = PurePosixPath(entry.path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError(f"not a relative path inside the tree: {entry.path!r}")
        for parent in reversed(pure.parents[:-1]):
            tree.setdefault(str(parent), directory(str(parent)))
        if str(pure) in tree and not stat.S_ISDIR(entry.mode):
            raise ValueError(f"two entries for {entry.path!r}")
        tree[str(pure)] = entry
    return list(tree.values())


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, their parent folders added. Raises ValueError as `with_parents` does."""
    archive = bytearray()
    for number, entry in enumerate(with_parents(entries), start=1):
        _append(archive, number, entry)
    _append(archive, 0, Entry(_TRAILER, 0))
    return bytes(archive)


def _append(archive: bytearray, inode: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    archive += _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    _align(archive)
    archive += entry.data
    _align(archive)


def _align(archive: bytearray) -> None:
    archive += bytes(-len(archive) % 4)


def write_tree(entries: Iterable[Entry], folder: Path) -> None:
    """Lay the entries out as real files below `folder`, except device nodes, which only root can make."""
    for entry in with_parents(entries):
        path = folder / entry.path
        if stat.S_ISDIR(entry.mode):
            path.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
        else:
            continue
        if not stat.S_ISLNK(entry.mode):
            path.chmod(stat.S_IMODE(entry.mode))
