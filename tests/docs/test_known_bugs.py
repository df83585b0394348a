"""docs/known-bugs.md: every row has a test that exists or a reason, and every test of tests/hostile is in a row."""

import ast
import re
from collections import Counter
from pathlib import Path

TOP = Path(__file__).parents[2]
TEXT = (TOP / "docs" / "known-bugs.md").read_text()
FILES = dict(re.findall(r"`(\w+)` is\s+tests/(hostile/\w+\.py)", TEXT))
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| no. |", "| input |"))
]
NUMBERS = [row[0] for row in ROWS if len(row) == 5]


def _named(text: str) -> list[tuple[str, str]]:
    """(file below tests, name of a test) of all that a text names."""
    return [(FILES.get(file, file), name) for file, name in re.findall(r"`([\w./]+)::(test_\w+)`", text)]


def _tests(file: str) -> set[str]:
    tree = ast.parse((TOP / "tests" / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    assert len(_named(TEXT)) > 150
    assert [(file, name) for file, name in _named(TEXT) if name not in _tests(file)] == []


def test_every_hostile_test_is_in_a_row() -> None:
    named = set(_named(TEXT))
    files = [f"hostile/{path.name}" for path in (TOP / "tests" / "hostile").glob("test_*.py")]
    assert sorted(set(files) - set(FILES.values())) == []
    assert [(file, name) for file in FILES.values() for name in _tests(file) if (file, name) not in named] == []


def test_every_row_is_tried_or_says_why_not() -> None:
    for row in ROWS:
        others = [f"no. {number}" for number in NUMBERS]
        reason = re.search(r"when that type comes|\bnot here\b|no such log|unsigned|each test here", row[-1])
        assert _named(row[-1]) or reason or any(other in row[-1] for other in others), row
        for number in re.findall(r"no\. (\w+)", row[-1]):
            assert number in NUMBERS, row


def test_every_number_has_its_row() -> None:
    assert [number for number in map(str, range(1, 48)) if number not in NUMBERS] == ["38"]
    assert {"16b", *(f"38{letter}" for letter in "abcdef")} <= set(NUMBERS)
    assert len(NUMBERS) == len(set(NUMBERS))


def test_every_hostile_test_says_what_it_tries() -> None:
    for file in FILES.values():
        tree = ast.parse((TOP / "tests" / file).read_text())
        for node in tree.body:
            if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), (file, node.name)


def test_the_negative_suites_score_is_that_of_its_rows() -> None:
    text = (TOP / "docs" / "negative-suite.md").read_text()
    row = re.compile(r"^\| (T|P|PCI|S|B|N|C|RNG|L) \| ([\d ]+) \| .* \| (\w+) \| (`.*`) \|", re.MULTILINE)
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for group, numbers, verdict, tests in row.findall(text):
        named = _named(tests)
        assert named, (group, numbers)
        assert [name for file, name in named if name not in _tests(file)] == []
        for number in numbers.split():
            assert (group, number) not in seen
            seen.add((group, number))
            counts[verdict] += 1
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("served", "ignored", "refused", "survived"))
    assert f"{len(seen)} situations, of which {words}; none failed." in text
    assert counts.total() == len(seen) > 300
