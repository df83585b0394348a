"""Names: one for one class, so that a search for it finds one place; and first lines that a search would find."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]

# A sentence about the class, or a clause for its name, instead of its name: "Sends …", "What … is".
_NO_NOUN = re.compile(
    "(What|How|Who|Whoever|Where|When|Why|Is|Are|Has|Does|Makes|Sends|Takes|Gives|Gets|Creates|Keeps|Says|Tells|Serves"
    r"|Hands|Knows|Drives|Wants|Fills|Lets|Finds|Collects|Remembers)\b"
)


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax of all files."""
    # vfiouser_virtio/protocols is a symlink, which rglob follows in some versions of Python.
    roots = [ROOT / folder for folder in ("vfiouser_virtio", "protocols", "scripts")]
    files = {path.resolve() for root in roots for path in root.rglob("*.py")}
    return {path: ast.parse(path.read_bytes()) for path in sorted(files)}


def test_first_lines_of_modules_and_classes_are_noun_phrases() -> None:
    found = []
    for path, tree in trees().items():
        nodes: list[ast.Module | ast.ClassDef] = [tree]
        nodes += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in nodes:
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            if _NO_NOUN.match(line):
                found.append(f"{path}: {line}")
    assert found == []


def test_a_class_name_is_defined_in_one_file() -> None:
    places: dict[str, set[Path]] = defaultdict(set)
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(path)
    assert len(places) > 300
    assert {name: sorted(map(str, where)) for name, where in places.items() if len(where) > 1} == {}
