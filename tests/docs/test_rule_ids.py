"""Ids of rules, such as CC4, are explained once: in the tables of docs/conformance.md."""

import re
from pathlib import Path

TOP = Path(__file__).parents[2]
CHECKLIST = (TOP / "docs" / "conformance.md").read_text()
# A row of a table, or an entry of the lists of what is not checked, or only in part.
EXPLAINED = set(re.findall(r"^(?:\| `|- `virtio14/)([A-Z]{2}\d)(?=[`-])", CHECKLIST, re.MULTILINE))


def test_every_rule_that_the_code_names_is_explained() -> None:
    stems = "|".join(sorted({rule[:2] for rule in EXPLAINED}))
    unknown = {
        f"{path.relative_to(TOP)}: {found}"
        for folder in ("vfiouser_virtio", "protocols", "scripts")
        for path in (TOP / folder).rglob("*.py")
        for found in re.findall(rf"\b(?:{stems})\d\b", path.read_text())
        if found not in EXPLAINED
    }
    assert {"CC4", "UR2", "LG1"} <= EXPLAINED
    assert not unknown
