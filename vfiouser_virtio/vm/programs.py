"""Programs of an unpacked Debian tree, run with the tree's own dynamic loader and libraries."""

import subprocess
from pathlib import Path

from vfiouser_virtio.errors import ConfigError

# bookworm's packages still put files into /bin and /lib, trixie's put all of them below /usr.
_PROGRAM_DIRS = ("usr/sbin", "usr/bin", "sbin", "bin")
_LIBRARY_DIRS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_LOADER = "ld-linux-x86-64.so.2"


def find_program(root: Path, name: str) -> Path:
    """The program `name` of the tree. Raises ConfigError when the tree lacks it."""
    for folder in _PROGRAM_DIRS:
        if (path := root / folder / name).is_file():
            return path
    raise ConfigError(f"{root} has no program {name}: remove that folder and run again")


def library_dirs(root: Path) -> list[Path]:
    """The folders of the tree that hold its shared libraries."""
    return [path for path in (root / folder for folder in _LIBRARY_DIRS) if path.is_dir()]


def loader(root: Path) -> Path:
    """The tree's dynamic loader. Raises ConfigError when the tree lacks it."""
    for folder in library_dirs(root):
        if (path := folder / _LOADER).is_file():
            return path
    raise ConfigError(f"{root} has no {_LOADER}: remove that folder and run again")


def argv(root: Path, name: str, *, called: str | None = None) -> list[str]:
    """The start of a command line for the tree's program `name`, `called` so where one binary is several programs."""
    path = ":".join(str(folder) for folder in library_dirs(root))
    options = ["--library-path", path, "--argv0", called or name]
    return [str(loader(root)), *options, str(find_program(root, name))]


def libraries(root: Path, program: Path) -> dict[str, Path]:
    """What `program` needs at run time: each library's name and its file in the tree, the loader included.

    Raises ConfigError when the tree lacks one.
    """
    path = ":".join(str(folder) for folder in library_dirs(root))
    command = [str(loader(root)), "--library-path", path, "--list", str(program)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {_LOADER: loader(root)}
    for line in listed.stdout.splitlines():
        # `libz.so.1 => /path/libz.so.1 (0x…)`; the vDSO and the loader have no arrow or no path.
        name, arrow, where = line.strip().partition(" => ")
        if arrow and not name.endswith(_LOADER):
            found[name] = Path(where.rpartition(" (")[0])
    if listed.returncode != 0 or any(not file.is_file() for file in found.values()):
        raise ConfigError(f"{root} lacks a library of {program.name}: remove that folder and run again")
    return found
