"""docs/architecture.md names the rooms that there are: all of those of a package, and no other file."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PACKAGE = TOP / "vfiouser_virtio"
TEXT = (TOP / "docs" / "architecture.md").read_text(encoding="utf-8")

_WORD = re.compile(r"`([\w.]+)`")
_PATH = re.compile(r"\b[a-z_]+(?:/[a-z_]+)+\b")


def rooms() -> Iterator[tuple[str, str]]:
    """Package and module of each room in the table of rooms, of which an empty cell is as the one above."""
    package = ""
    for line in TEXT[TEXT.index("| package | room |") :].splitlines()[2:]:
        if not line.startswith("|"):
            return
        _, first, second, *_ = line.split("|")
        package = "".join(_WORD.findall(first)) or package
        for name in _WORD.findall(second):
            yield package, name


ROOMS = list(rooms())


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}


@pytest.mark.parametrize("package", sorted({package for package, _ in ROOMS}))
def test_the_rooms_of_a_package(package: str) -> None:
    named = [name for where, name in ROOMS if where == package]
    assert sorted(named) == sorted(modules(PACKAGE.joinpath(*package.split("."))))


def test_packages_and_what_is_outside_of_them() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(packages) > 10
    assert (packages | modules(PACKAGE)) - set(re.findall(r"\w+", " ".join(_WORD.findall(TEXT)))) == set()


def test_every_path_is_there() -> None:
    paths = {path for path in _PATH.findall(TEXT) if (PACKAGE / path.split("/")[0]).is_dir()}
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not list(PACKAGE.glob(f"{path}*"))] == []
