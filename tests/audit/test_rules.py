"""All rules: each has a driver that breaks it, and a row of the documentation."""

import re
from pathlib import Path

from vfiouser_virtio.audit import RULES
from vfiouser_virtio.audit.document import document

HERE = Path(__file__).parent
# Made in a loop, by the names of the features.
_BY_FEATURE = {f"features/{name}" for name in ("access-platform", "ring-packed", "order-platform", "notif-config-data")}


def test_each_rule_has_a_driver_that_breaks_it() -> None:
    said = {
        rule
        for path in HERE.glob("test_*.py")
        for rule in re.findall(r'(?:breaks|_gso)\(\s*"([^"]+)"', path.read_text())
    }
    assert set(RULES) - said - _BY_FEATURE == set()
    assert said <= set(RULES)


def test_the_page_is_what_the_rules_are() -> None:
    assert (HERE.parents[1] / "docs" / "audit.md").read_text() == document(), (
        "python -m vfiouser_virtio.audit > docs/audit.md"
    )


def test_a_rule_is_said_in_one_sentence() -> None:
    for rule in RULES.values():
        assert rule.text.endswith("."), rule
        assert "|" not in rule.text + rule.look + rule.section, rule
        assert rule.section[0] in "23456", rule
