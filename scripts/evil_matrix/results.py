"""Results of the matrix: a JSON line for each case and kernel; the last one of a case counts."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Result of a case on a kernel."""

    case: str
    """`EvilCase.id`."""
    suite: str
    """Debian suite, or file, that the kernel is from."""
    kernel: str
    """Its version."""
    outcome: str
    warned: bool
    neighbour: bool
    """Whether the guest's other device still works."""
    happened: int
    """How often the device has lied."""
    said: tuple[str, ...]
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What there is one result of."""
        return self.case, self.suite


def read(path: Path = FILE) -> dict[tuple[str, str], CaseResult]:
    """All results. Raises OSError, but for a file that is not there, and ValueError for a line that is none."""
    if not path.exists():
        return {}
    found: dict[tuple[str, str], CaseResult] = {}
    for line in path.read_text().splitlines():
        result = parse(line, str(path))
        found[result.key] = result
    return found


def parse(line: str, where: str = "") -> CaseResult:
    """Result of a line. Raises ValueError."""
    try:
        values = json.loads(line)
        return CaseResult(**{**values, "said": tuple(values["said"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: this is no result of the matrix: {error!r}") from None


def append(result: CaseResult, path: Path = FILE) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(_line(result))


def tidy(wanted: Iterable[tuple[str, str]], path: Path = FILE) -> None:
    """One line for each of these, in their order; those of cases that are no more go."""
    known = read(path)
    path.write_text("".join(_line(known[key]) for key in wanted if key in known))


def _line(result: CaseResult) -> str:
    return json.dumps(asdict(result), ensure_ascii=False) + "\n"
