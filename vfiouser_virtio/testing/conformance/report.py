"""Conformance report as text, JSON and JUnit XML, and the list of checks as text and JSON."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from vfiouser_virtio.device_log import printable
from vfiouser_virtio.testing.conformance.checks import CHECKS, Check
from vfiouser_virtio.testing.conformance.not_checked import NOT_CHECKED
from vfiouser_virtio.testing.conformance.verdicts import Result, Verdict

_MARKS = {
    Verdict.PASS: "pass  ",
    Verdict.FAIL: "FAIL  ",
    Verdict.ADVICE: "note  ",
    Verdict.NOT_APPLICABLE: "n/a   ",
    Verdict.BROKE: "BROKE ",
    Verdict.NOT_RUN: "-     ",
}
_ID_WIDTH = 30
_INDENT = " " * 8


def text_line(result: Result) -> str:
    """One result; what failed says its rule, where that stands, how it was observed, and what was seen."""
    check = CHECKS[result.check_id]
    line = f"{_MARKS[result.verdict]}{check.id:<{_ID_WIDTH}}"
    if result.verdict is Verdict.PASS:
        return f"{line}{check.section}"
    if result.verdict in (Verdict.NOT_APPLICABLE, Verdict.NOT_RUN):
        return f"{line}{printable(result.detail)}"
    return "\n".join(
        [
            f"{line}{check.section}, {check.keyword}",
            _wrapped("rule: ", check.rule),
            _wrapped("look: ", check.observe),
            _wrapped("seen: ", printable(result.detail)),
        ]
    )


def _wrapped(label: str, text: str) -> str:
    return textwrap.fill(text, 118, initial_indent=_INDENT + label, subsequent_indent=_INDENT + " " * len(label))


def summary(results: Sequence[Result]) -> str:
    """How many of each verdict."""
    counts = Counter(result.verdict for result in results)
    return f"{len(results)} checks: " + ", ".join(
        f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict]
    )


def as_json(server: str, results: Sequence[Result]) -> str:
    """All that is known of each check, for programs."""
    return json.dumps(
        {
            "server": server,
            "summary": {verdict.value: sum(each.verdict is verdict for each in results) for verdict in Verdict},
            "checks": [
                {
                    **_as_dict(CHECKS[result.check_id]),
                    "verdict": result.verdict.value,
                    "detail": result.detail,
                    "seconds": round(result.seconds, 3),
                }
                for result in results
            ],
        },
        indent=2,
    )


def list_json(checks: Iterable[Check]) -> str:
    """The checks, without results."""
    return json.dumps({"checks": [_as_dict(check) for check in checks], "not-checked": NOT_CHECKED}, indent=2)


def _as_dict(check: Check) -> dict[str, object]:
    return {
        "id": check.id,
        "section": check.section,
        "keyword": check.keyword,
        "rule": check.rule,
        "observed": check.observe,
        "needs": [need.text for need in check.needs],
    }


def as_junit(server: str, results: Sequence[Result]) -> str:
    """JUnit XML: a failed rule is a failure, a broken server an error, what does not apply is skipped."""
    tags = {
        Verdict.FAIL: "failure",
        Verdict.BROKE: "error",
        Verdict.ADVICE: "skipped",
        Verdict.NOT_APPLICABLE: "skipped",
        Verdict.NOT_RUN: "error",
    }
    counts = Counter(tags.get(result.verdict, "") for result in results)
    suite = ElementTree.Element(
        "testsuite",
        name=f"vfiouser-virtio conform {server}",
        tests=str(len(results)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        check = CHECKS[result.check_id]
        group, _, name = check.id.rpartition("/")
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=name, time=f"{result.seconds:.3f}")
        if (tag := tags.get(result.verdict)) is not None:
            found = ElementTree.SubElement(case, tag, message=_printable(result.detail))
            if tag != "skipped":
                found.text = _printable(f"{check.keyword}: {check.rule}\nsection: {check.section}\n{check.observe}")
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def list_text(checks: Iterable[Check]) -> str:
    """The checks, one line each."""
    return "\n".join(f"{check.id:<{_ID_WIDTH}}{check.keyword:<8}{check.rule}" for check in checks)
