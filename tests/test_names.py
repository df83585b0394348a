"""Names: one for one class, so that a search for it finds one place."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_class_name_is_defined_in_one_file() -> None:
    # vfiouser_virtio/protocols is a symlink, which rglob follows in some versions of Python.
    roots = [ROOT / folder for folder in ("vfiouser_virtio", "protocols", "scripts")]
    files = {path.resolve() for root in roots for path in root.rglob("*.py")}
    places: dict[str, set[Path]] = defaultdict(set)
    for path in files:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(path)
    assert len(places) > 300
    assert {name: sorted(map(str, where)) for name, where in places.items() if len(where) > 1} == {}
