"""Rules for drivers: one declaration each, with its section of virtio 1.4 and what the audit looks at."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Keyword: TypeAlias = Literal["MUST", "SHOULD"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule for drivers."""

    id: str
    """Group and name: ``split/next-range``."""
    section: str
    """Number and title. "prose" is added where the sentence stands outside of a normative section."""
    keyword: Keyword
    text: str
    look: str
    """What the audit looks at."""


RULES: dict[str, Rule] = {}
"""All rules that the audit can find broken, by id, as far as their modules are imported."""


def must(rule_id: str, section: str, text: str, look: str) -> Rule:
    """Declare a rule that a driver MUST keep."""
    return _declare(Rule(rule_id, section, "MUST", text, look))


def should(rule_id: str, section: str, text: str, look: str) -> Rule:
    """Declare a rule that a driver SHOULD keep: what is found is no failure."""
    return _declare(Rule(rule_id, section, "SHOULD", text, look))


def _declare(rule: Rule) -> Rule:
    assert rule.id not in RULES, rule.id
    RULES[rule.id] = rule
    return rule
