"""The cpio writer, read back by an independent reader and by the system's cpio where there is one."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vfiouser_virtio.vm import newc
from vfiouser_virtio.vm.initramfs import fetch_tools

TREE = [
    newc.directory("dev"),
    newc.char_device("dev/console", 5, 1),
    newc.file("bin/busybox", b"\x7fELF" + bytes(range(256)), 0o755),
    newc.symlink("bin/sh", "busybox"),
    newc.file("etc/empty", b""),
    newc.file("etc/three", b"abc"),
    newc.directory("tmp", 0o1777),
]


def read_newc(archive: bytes) -> dict[str, tuple[dict[str, int], bytes]]:
    """Every member: its header fields by name, and its data. Written from the format's description, not from ours."""
    names = [
        "ino",
        "mode",
        "uid",
        "gid",
        "nlink",
        "mtime",
        "filesize",
        "maj",
        "min",
        "rmaj",
        "rmin",
        "namesize",
        "check",
    ]
    members: dict[str, Any] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        words = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        fields = dict(zip(names, words, strict=True))
        name = archive[at + 110 : at + 110 + fields["namesize"]]
        assert name.endswith(b"\0")
        at = (at + 110 + fields["namesize"] + 3) // 4 * 4
        data = archive[at : at + fields["filesize"]]
        at = (at + fields["filesize"] + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return members
        members[name[:-1].decode()] = (fields, data)


def test_members_read_back() -> None:
    members = read_newc(newc.pack(TREE))
    assert list(members) == [
        "dev",
        "dev/console",
        "bin",
        "bin/busybox",
        "bin/sh",
        "etc",
        "etc/empty",
        "etc/three",
        "tmp",
    ]
    console, _ = members["dev/console"]
    assert stat.S_ISCHR(console["mode"])
    assert (console["rmaj"], console["rmin"]) == (5, 1)
    busybox, data = members["bin/busybox"]
    assert busybox["mode"] == stat.S_IFREG | 0o755
    assert data == b"\x7fELF" + bytes(range(256))
    link, target = members["bin/sh"]
    assert stat.S_ISLNK(link["mode"])
    assert target == b"busybox"
    assert members["tmp"][0]["mode"] == stat.S_IFDIR | 0o1777
    assert members["bin"][0]["mode"] == stat.S_IFDIR | 0o755
    assert members["etc/empty"][1] == b""


def test_inode_numbers_differ_so_that_no_two_files_are_one() -> None:
    inodes = [fields["ino"] for fields, _ in read_newc(newc.pack(TREE)).values()]
    assert len(set(inodes)) == len(inodes)


def test_same_entries_give_the_same_bytes() -> None:
    assert newc.pack(TREE) == newc.pack(iter(TREE))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", ""])
def test_path_outside_the_tree_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        newc.pack([newc.file(path, b"")])


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries"):
        newc.pack([newc.file("a", b"1"), newc.file("a", b"2")])


@pytest.mark.qemu  # for the fetched busybox
def test_busyboxs_cpio_agrees(tmp_path: Path) -> None:
    plain = [entry for entry in TREE if not stat.S_ISCHR(entry.mode)]
    busybox = next(fetch_tools().glob("**/bin/busybox"))
    subprocess.run([busybox, "cpio", "-i"], input=newc.pack(plain), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/busybox").read_bytes() == b"\x7fELF" + bytes(range(256))
    assert os.readlink(tmp_path / "bin/sh") == "busybox"
    assert (tmp_path / "etc/three").read_bytes() == b"abc"


def test_tree_on_disk_is_the_same_but_for_device_nodes(tmp_path: Path) -> None:
    newc.write_tree(TREE, tmp_path)
    assert os.readlink(tmp_path / "bin/sh") == "busybox"
    assert stat.S_IMODE((tmp_path / "bin/busybox").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777
    assert (tmp_path / "etc/three").read_bytes() == b"abc"
    assert list((tmp_path / "dev").iterdir()) == []
