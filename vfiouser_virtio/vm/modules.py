"""Kernel modules and their dependencies, resolved from modules.dep (kmod, modules.dep(5)), for an initramfs."""

import gzip
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import newc

_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".ko": bytes, ".ko.xz": lzma.decompress, ".ko.gz": gzip.decompress}


def module_name(path: str) -> str:
    """The name that a module's file has in the kernel: `kernel/x/virtio-rng.ko.xz` is `virtio_rng`."""
    return PurePosixPath(path).name.split(".", 1)[0].replace("-", "_")


def parse_dep(text: str) -> dict[str, list[str]]:
    """modules.dep as a table: each module's path, and the paths of those it needs."""
    table: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, colon, needs = line.partition(":")
        if colon:
            table[path] = needs.split()
    return table


def resolve(table: dict[str, list[str]], wanted: Iterable[str]) -> list[str]:
    """The paths of the wanted modules and of all they need, each after what it needs.

    A wanted module that the table lacks is left out: it is built in, or the kernel has no such driver.
    Raises ConfigError for a cycle or for a dependency that is not in the table.
    """
    by_name = {module_name(path): path for path in table}
    ordered: dict[str, None] = {}

    def visit(path: str, above: tuple[str, ...]) -> None:
        if path in above:
            raise ConfigError(f"modules.dep has a cycle: {' needs '.join((*above, path))}")
        if path not in table:
            raise ConfigError(f"modules.dep lacks {path}, which {above[-1]} needs: run depmod")
        if path not in ordered:
            for needed in table[path]:
                visit(needed, (*above, path))
            ordered[path] = None

    for name in wanted:
        if (path := by_name.get(module_name(name))) is not None:
            visit(path, ())
    return list(ordered)


def check_names(folder: Path | None, version: str, wanted: Iterable[str]) -> None:
    """Raise ConfigError for a name of no module in the kernel's folder, be it a file of its own or built in."""
    known: set[str] = set()
    for file in ("modules.dep", "modules.builtin"):
        if folder is not None and (folder / file).is_file():
            lines = (folder / file).read_text().splitlines()
            known |= {module_name(line.partition(":")[0]) for line in lines}
    for name in wanted:
        if module_name(name) not in known:
            hint = "; Debian's trixie:amd64 has more of them" if "cloud" in version else ""
            raise ConfigError(f"Linux {version} has no module {name}{hint}")


def read_module(path: Path) -> bytes:
    """A module as the kernel's loader takes it. Raises ConfigError for a compression we cannot undo."""
    suffix = "." + path.name.split(".", 1)[1]
    if suffix not in _DECOMPRESS:
        raise ConfigError(f"cannot unpack {path}: {suffix} modules are not supported, only {', '.join(_DECOMPRESS)}")
    return _DECOMPRESS[suffix](path.read_bytes())


def module_tree(
    folder: Path, version: str, wanted: Iterable[str], more_aliases: Iterable[tuple[str, str]] = ()
) -> list[newc.Entry]:
    """`lib/modules/VERSION` for the guest: the wanted modules, unpacked, with what modprobe needs to find them.

    `folder` is the kernel's modules folder. `more_aliases` are a pattern and a module each, beside those of the kernel:
    modprobe loads all that match. Raises ConfigError as `resolve` and `read_module` do.
    """
    table = parse_dep((folder / "modules.dep").read_text())
    ordered = resolve(table, wanted)
    renamed = {path: str(PurePosixPath(path).parent / f"{module_name(path)}.ko") for path in ordered}
    base = f"lib/modules/{version}"
    entries = [newc.file(f"{base}/{renamed[path]}", read_module(folder / path)) for path in ordered]
    # busybox's modprobe loads the last one named first, so a complete list in reverse order needs no other look-up.
    dep = "".join(
        f"{renamed[path]}: {' '.join(renamed[p] for p in reversed(resolve(table, [path])) if p != path)}\n"
        for path in ordered
    )
    names = {module_name(path) for path in ordered}
    alias_file = folder / "modules.alias"
    lines = alias_file.read_text().splitlines(keepends=True) if alias_file.is_file() else []
    lines += [f"alias {pattern} {module_name(name)}\n" for pattern, name in more_aliases]
    aliases = "".join(line for line in lines if line.split()[-1:] and line.split()[-1] in names)
    return [
        *entries,
        newc.file(f"{base}/modules.dep", dep.encode()),
        newc.file(f"{base}/modules.alias", aliases.encode()),
    ]
