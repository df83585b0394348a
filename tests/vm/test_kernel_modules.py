"""Module dependencies, on a made-up modules folder."""

import gzip
import lzma
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import kernel, modules

DEP = """\
kernel/drivers/virtio/virtio.ko.xz:
kernel/drivers/virtio/virtio_ring.ko.xz: kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/char/hw_random/virtio-rng.ko.gz: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/fs/other.ko: kernel/fs/helper.ko
kernel/fs/helper.ko:
"""

ALIAS = """\
# Aliases extracted from modules themselves.
alias virtio:d00000002v* virtio_blk
alias virtio:d00000004v* virtio_rng
alias fs-other other
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A modules folder with every way of packing that we undo."""
    packing: dict[str, Callable[[bytes], bytes]] = {".ko.xz": lzma.compress, ".ko.gz": gzip.compress, ".ko": bytes}
    for path in modules.parse_dep(DEP):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pack = packing["." + file.name.split(".", 1)[1]]
        file.write_bytes(pack(b"ELF of " + modules.module_name(path).encode()))
    (tmp_path / "modules.dep").write_text(DEP)
    (tmp_path / "modules.alias").write_text(ALIAS)
    return tmp_path


def names(paths: list[str]) -> list[str]:
    return [modules.module_name(path) for path in paths]


def test_each_module_comes_after_what_it_needs_and_once() -> None:
    order = names(modules.resolve(modules.parse_dep(DEP), ["virtio_rng", "virtio_blk"]))
    assert order == ["virtio", "virtio_ring", "virtio_rng", "virtio_blk"]


def test_dash_and_underscore_are_the_same_in_a_name() -> None:
    assert names(modules.resolve(modules.parse_dep(DEP), ["virtio-rng"]))[-1] == "virtio_rng"


def test_module_that_is_built_in_is_left_out() -> None:
    assert modules.resolve(modules.parse_dep(DEP), ["virtio_console"]) == []


def test_cycle_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"cycle: a\.ko needs b\.ko needs a\.ko"):
        modules.resolve(modules.parse_dep("a.ko: b.ko\nb.ko: a.ko\n"), ["a"])


def test_dependency_without_a_line_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"lacks b\.ko, which a\.ko needs"):
        modules.resolve(modules.parse_dep("a.ko: b.ko\n"), ["a"])


# Modules that a device is to load beside its driver.
MORE = [("virtio:d00000002v*", "virtio-rng"), ("virtio:d00000002v*", "absent")]


def test_tree_for_the_guest_has_unpacked_modules_and_what_modprobe_reads(folder: Path) -> None:
    tree = {entry.path: entry for entry in modules.module_tree(folder, "6.1", ["virtio_blk", "virtio_rng"], MORE)}
    base = "lib/modules/6.1"
    assert tree[f"{base}/kernel/drivers/block/virtio_blk.ko"].data == b"ELF of virtio_blk"
    assert tree[f"{base}/kernel/drivers/char/hw_random/virtio_rng.ko"].data == b"ELF of virtio_rng"
    assert all(stat.S_ISREG(entry.mode) for entry in tree.values())
    dep = modules.parse_dep(tree[f"{base}/modules.dep"].data.decode())
    # modprobe loads the last one first.
    assert names(dep["kernel/drivers/block/virtio_blk.ko"]) == ["virtio_ring", "virtio"]
    assert all(f"{base}/{path}" in tree for path in dep)
    aliases = tree[f"{base}/modules.alias"].data.decode()
    assert "alias virtio:d00000002v* virtio_blk\n" in aliases
    assert "other" not in aliases
    assert "alias virtio:d00000002v* virtio_rng\n" in aliases
    assert "absent" not in aliases


def test_compression_that_we_cannot_undo_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "virtio_blk.ko.zst"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\.ko\.zst modules are not supported"):
        modules.read_module(file)


def bzimage(version: bytes) -> bytes:
    """The head of a bzImage, as Documentation/arch/x86/boot.rst has it."""
    image = bytearray(0x4000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x3000 - 0x200).to_bytes(2, "little")
    image[0x3000 : 0x3000 + len(version)] = version
    return bytes(image)


def test_kernel_of_the_users_own_finds_its_modules(tmp_path: Path) -> None:
    image = tmp_path / "boot/vmlinuz-6.99-test"
    image.parent.mkdir()
    image.write_bytes(bzimage(b"6.99-test (someone@here) #1 SMP\0"))
    assert kernel.find_kernel(str(image)) == kernel.Kernel("6.99-test", image, None, image)
    folder = tmp_path / "usr/lib/modules/6.99-test"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("")
    assert kernel.find_kernel(str(image)).modules == folder


def test_modules_folder_without_modules_dep_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(b"6.99 x\0"))
    with pytest.raises(ConfigError, match=r"has no modules\.dep"):
        kernel.find_kernel(str(image), modules=tmp_path)


def test_file_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a kernel")
    with pytest.raises(ConfigError, match="not an x86 Linux kernel"):
        kernel.find_kernel(str(text))
    with pytest.raises(ConfigError, match="No such file"):
        kernel.find_kernel(str(tmp_path / "missing"))


def test_named_module_is_one_that_the_kernel_has_or_has_built_in(folder: Path) -> None:
    (folder / "modules.builtin").write_text("kernel/drivers/tty/serial/8250/8250_pci.ko\n")
    modules.check_names(folder, "6.1", ["virtio-blk", "8250_pci", "8250-pci"])
    with pytest.raises(ConfigError, match=r"^Linux 6\.1-cloud has no module lm75; Debian's trixie:amd64 has more"):
        modules.check_names(folder, "6.1-cloud", ["virtio_blk", "lm75"])
    with pytest.raises(ConfigError, match=r"^Linux 6\.1 has no module virtio_blk$"):
        modules.check_names(None, "6.1", ["virtio_blk"])
