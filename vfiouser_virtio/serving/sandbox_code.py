"""Code that Python may have to read in a sandbox: for imports that come late, and for the lines of tracebacks.

Folders of nothing but code (the standard library, site-packages, packages that are loaded) are read as a whole. Others
on ``sys.path``, such as the one of a device file, may have anything beside it: there, only modules and packages are.
"""

import importlib.machinery
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from vfiouser_virtio.protocols.landlock import AccessFs

READ = AccessFs.READ_FILE | AccessFs.READ_DIR
"""To read files, and to list folders."""

# Of one folder: an author's has some ten.
_MOST_MODULES = 1000


def code() -> Iterator[tuple[Path, AccessFs]]:
    """Files and folders of code, which need not be there, and the rights on each."""
    whole = _folders_of_code()
    for path in whole:
        yield path, READ
    for entry in dict.fromkeys(Path(os.path.realpath(entry)) for entry in sys.path):
        if not _within(entry, whole):
            yield from _modules(entry)


def _folders_of_code() -> set[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {os.path.dirname(os.__file__), *(sysconfig.get_path(name) for name in names), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        found.add(site.getusersitepackages())
    for module in list(sys.modules.values()):
        places = list(getattr(module, "__path__", None) or ())
        file = getattr(module, "__file__", None)
        if not places and file is not None:
            places = [file]
        found.update(places)
    paths = {Path(os.path.realpath(place)) for place in found}
    return {path for path in paths if not any(parent in paths for parent in path.parents)}


def _modules(folder: Path) -> Iterator[tuple[Path, AccessFs]]:
    """Of a folder that may have other files too: which there are, and modules and packages, with what is compiled."""
    try:
        there = sorted(folder.iterdir())
    except OSError:  # none, a file (a ZIP archive is read when Python starts), or not for us
        return
    yield folder, AccessFs.READ_DIR
    yield folder / "__pycache__", READ
    suffixes = tuple(importlib.machinery.all_suffixes())
    modules = [path for path in there if path.name.endswith(suffixes) or (path / "__init__.py").is_file()]
    for path in modules[:_MOST_MODULES]:
        yield path, READ


def _within(path: Path, folders: set[Path]) -> bool:
    return path in folders or any(parent in folders for parent in path.parents)
