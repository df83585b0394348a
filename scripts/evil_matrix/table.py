"""Results as text: a line each, and the tables of docs/evil.md."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from evil_matrix.cases import CASES, SUITES, EvilCase
from evil_matrix.classify import Outcome
from evil_matrix.results import CaseResult

DOCUMENT = Path(__file__).parents[2] / "docs" / "evil.md"
BEGIN, END = "<!-- scripts/evil-matrix --write -->\n", "<!-- end of it -->\n"
_BAD = {Outcome.WRONG.value, Outcome.HANG.value, Outcome.OOPS.value}

Known = Mapping[tuple[str, str], CaseResult]


def line(result: CaseResult) -> str:
    """A result in a line."""
    said = f": {result.said[0]}" if result.said else ""
    return f"{_verdict(result):20} {result.seconds:5.1f} s  {result.happened:5} times  {result.case}{said}"


def _verdict(result: CaseResult) -> str:
    words = [result.outcome, *(["warn"] if result.warned else []), *([] if result.neighbour else ["neighbour too"])]
    return ", ".join(words)


def listing(known: Known, cases: Sequence[EvilCase], suites: Sequence[str]) -> str:
    """A line for each case."""
    lines = []
    for case in cases:
        found = [_verdict(result) if (result := known.get((case.id, suite))) else "-" for suite in suites]
        lines.append(f"{case.id:60} {' | '.join(found)}")
    return "\n".join(lines)


def markdown(known: Known, cases: Sequence[EvilCase] = CASES, suites: Sequence[str] = SUITES) -> str:
    """A table for each device type, and how often each outcome was."""
    versions = {result.suite: result.kernel for result in known.values()}
    lines = ["| kernel |" + "".join(f" {outcome.value} |" for outcome in Outcome) + " of them with a warning |"]
    lines.append("|---" * (len(Outcome) + 2) + "|")
    for suite in suites:
        of_it = [known[case.id, suite] for case in cases if case.faults and (case.id, suite) in known]
        of_it = [result for result in of_it if result.happened]
        counts = Counter(result.outcome for result in of_it)
        cells = [counts[outcome.value] for outcome in Outcome] + [sum(result.warned for result in of_it)]
        lines.append(f"| Linux {versions.get(suite, suite)} |" + "".join(f" {cell} |" for cell in cells))
    for device in dict.fromkeys(case.device for case in cases):
        lines += ["", f"`{device}`:", ""]
        lines.append("| fault |" + "".join(f" {versions.get(suite, suite)} |" for suite in suites) + " what it says |")
        lines.append("|---" * (len(suites) + 2) + "|")
        lines += [_row(case, known, suites) for case in cases if case.device == device]
    return "\n".join(lines) + "\n"


def _row(case: EvilCase, known: Known, suites: Sequence[str]) -> str:
    found = [known.get((case.id, suite)) for suite in suites]
    name = " ".join(f"`{fault}`" for fault in case.faults) or "none"
    name += f" (`{case.options}`)" if case.options else ""
    said = list(dict.fromkeys(result.said[0] for result in found if result and result.said))
    if len(said) == 2 and _alike(*said):
        del said[1]
    says = f"({case.never})" if case.never else _quoted(said)
    return f"| {name} |" + "".join(f" {_cell(case, result)} |" for result in found) + f" {says} |"


def _cell(case: EvilCase, result: CaseResult | None) -> str:
    if result is None:
        return ""
    if case.faults and not result.happened:
        return "does not happen"
    verdict = _verdict(result)
    return f"**{verdict}**" if result.outcome in _BAD or result.warned else verdict


def _alike(one: str, other: str) -> bool:
    """Whether two lines differ in numbers only."""
    return _letters(one) == _letters(other)


def _letters(text: str) -> str:
    return "".join(character for character in text if character not in "0123456789abcdefx")


def _quoted(said: Sequence[str]) -> str:
    return "; ".join(f"`{text[:140].replace('|', '/').replace('`', chr(39))}`" for text in said)


def section(known: Known) -> str:
    """What is in docs/evil.md between the two marks, which are in it."""
    return f"{BEGIN}\n{markdown(known)}\n{END}"


def write(known: Known, path: Path = DOCUMENT) -> None:
    """Put the tables into the document. Raises ValueError where its marks are not there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: there is no {BEGIN.strip()} and {END.strip()}")
    path.write_text(before + section(known) + after)
