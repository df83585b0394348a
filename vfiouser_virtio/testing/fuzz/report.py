"""Report of a fuzzing run: what was run, how fast, what was found and where it lies; as text and as JSON."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.output_file import write_report
from vfiouser_virtio.testing.fuzz.oracle import Finding

ONCE = "seen once, and not again"
"""Note with what does not count, because a busy machine could feign it: origin and first line of each."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """Finding, with where its case came from, and the file that has the smallest case that shows it."""

    origin: str
    steps: int
    """How many that case has."""
    finding: Finding
    path: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What two discoveries of the same fault have in common."""
        return self.finding.key


@dataclass(slots=True)
class FuzzReport:
    """Report of one run; it grows while that goes on."""

    target: str
    seed: int
    cases: int = 0
    lines: int = 0
    """Lines that were run, where coverage guides."""
    corpus: int = 0
    """Cases that are kept because they have seen new ones."""
    discoveries: list[Discovery] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    """What else there is to say, by name."""
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took, or has taken."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def rate(self) -> float:
        """Cases a second."""
        return self.cases / max(self.seconds, 1e-3)

    def add(self, discovery: Discovery) -> bool:
        """Take in a finding; whether it is a new one, or has been seen only once so far."""
        for known in [each for each in self.discoveries if each.key == discovery.key]:
            if discovery.finding.once or not known.finding.once:
                return False
            self.discoveries.remove(known)
        self.discoveries.append(discovery)
        return True

    def line(self) -> str:
        """What there is to say now, in one line."""
        lines = f"{self.lines} lines, {self.corpus} kept, " if self.lines else ""
        return f"{self.cases} cases, {self.rate:.0f}/s, {lines}{len(self.discoveries)} findings"

    def text(self) -> str:
        """For people."""
        lines = [f"{self.target}: {self.line()} in {self.seconds:.0f} s, seed {self.seed}"]
        for name, value in self.notes.items():
            lines.append(f"  {name}: {'; '.join(map(str, value)) if isinstance(value, list) else value}")
        for found in self.discoveries:
            first = str(found.finding).splitlines()[0]
            lines.append(f"  {first}\n    {found.steps} steps: {found.path or found.origin}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """For programs."""
        found = [
            {**asdict(each.finding), "origin": each.origin, "steps": each.steps, "file": each.path}
            for each in self.discoveries
        ]
        content: Mapping[str, object] = {
            "target": self.target,
            "seed": self.seed,
            "cases": self.cases,
            "seconds": round(self.seconds, 3),
            "lines": self.lines,
            "corpus": self.corpus,
            "notes": self.notes,
            "findings": found,
        }
        return json.dumps(content, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """`as_json` as a file. Raises ConfigError."""
        try:
            write_report(path, self.as_json())
        except OSError as error:
            raise ConfigError(f"--report: cannot write {path}: {error.strerror}") from None
