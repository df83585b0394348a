"""Coverage-guided cases: those that run new lines are kept in a folder, and made into others."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.coverage import LineCoverage
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS
from vfiouser_virtio.testing.fuzz.save import load
from vfiouser_virtio.testing.fuzz.stage import check_steps
from vfiouser_virtio.testing.fuzz.targets import TARGETS
from vfiouser_virtio.testing.fuzz.values import mutated, number

_HEX = ("data", "body")
_MOST_STEPS = 200


@dataclass(slots=True)
class FuzzCorpus:
    """Cases of a folder, and what lines they have run."""

    folder: Path
    coverage: LineCoverage
    cases: list[Case] = field(default_factory=list)

    def waiting(self, targets: Sequence[str]) -> list[Case]:
        """The cases in the folder that are for one of these targets, smallest first: to run before all others.

        Raises ConfigError for files that are no cases.
        """
        files = sorted(self.folder.glob("*.json"), key=lambda path: (path.stat().st_size, path.name))
        return [case for case in map(_load, files) if case.target in targets and _fits(case)]

    def merge(
        self,
        others: Sequence[Path],
        targets: Sequence[str],
        run: Callable[[Case], object],
        over: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make the folder the least that runs all lines which its cases and those of ``others`` run, smallest first.

        Cases for other targets stay as they are. False where it was ``over`` before: nothing was removed then.
        Raises ConfigError for files that are no cases.
        """
        files = [path for folder in (self.folder, *others) for path in folder.glob("*.json")]
        needless, saved = list[Path](), set[Path]()
        for path in sorted(files, key=lambda path: (path.stat().st_size, path.parent != self.folder, path.name)):
            case, is_ours = _load(path), path.parent == self.folder
            if case.target not in targets or not _fits(case):
                continue
            if over():
                return False
            if not self.run(case, run):
                needless += [path] if is_ours else []
            elif not is_ours:
                saved.add(self.save(case))
        for path in needless:
            if path not in saved:
                path.unlink(missing_ok=True)
        return True

    def run(self, case: Case, run: Callable[[Case], object]) -> bool:
        """Run a case, and keep it if it has run new lines; whether it was kept."""
        return bool(self.run_group([case], lambda _: run(case)))

    def run_group(self, cases: Sequence[Case], run: Callable[[Callable[[int], None]], object]) -> list[Case]:
        """Run cases together, and keep those that have run new lines, which are given back.

        ``run`` calls what it is given with the number of each case but the first when that begins. What runs a line
        late, because a device's work ended later, is taken for the next one; `merge` lets those go.
        """
        grown, current, seen = set[int](), 0, self.coverage.lines

        def began(number: int) -> None:
            nonlocal current, seen
            if self.coverage.lines > seen:
                grown.add(current)
            current, seen = number, self.coverage.lines

        run(began)
        began(len(cases))
        kept = [case for number, case in enumerate(cases) if number in grown]
        self.cases += kept
        return kept

    def save(self, case: Case) -> Path:
        """Write a kept case; the file. Raises ConfigError."""
        text = case.dumps()
        path = self.folder / f"{case.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise ConfigError(f"--corpus: cannot write {path}: {error.strerror}") from None
        return path

    def offspring(self, random: Random, fresh: Case) -> Case:
        """A kept case with something of ``fresh`` in it, and a few things changed; else ``fresh`` itself."""
        alike = [case for case in self.cases if case.target == fresh.target]
        if not alike or random.random() < 0.4:
            return fresh
        parent = random.choice(alike)
        steps = [dict(step) for step in parent.steps]
        for _ in range(random.randint(1, 4)):
            _change(random, steps, fresh.steps)
        return replace(parent, steps=steps[:_MOST_STEPS], origin=f"{fresh.origin} of {parent.origin}"[:100])


def _load(path: Path) -> Case:
    case = load(path)
    target = PCI_TARGETS.get(case.target) or TARGETS.get(case.target)
    try:
        if target is not None:
            check_steps(case, target)
    except ValueError as error:
        raise ConfigError(f"{path}: no fuzz case: {error}") from None
    return case


def _fits(case: Case) -> bool:
    """Whether the device still has the registers that are named in the case."""
    target = PCI_TARGETS.get(case.target)
    return target is None or not target.unknown(case)


def _change(random: Random, steps: list[Step], others: Sequence[Step]) -> None:
    at = random.randrange(len(steps) + 1)
    how = random.randrange(4)
    if how == 0 and others:
        first = random.randrange(len(others))
        steps[at:at] = [dict(step) for step in others[first : first + random.randint(1, 8)]]
    elif how == 1 and len(steps) > 1:
        del steps[at : at + random.randint(1, 3)]
    elif how == 2:
        steps[at:at] = [dict(step) for step in steps[at : at + random.randint(1, 4)]]
    elif at < len(steps):
        _spoil(random, steps[at])


def _spoil(random: Random, step: Step) -> None:
    """Another number, or other bytes, in one parameter."""
    name = random.choice(list(step))
    value = step[name]
    if name in _HEX and isinstance(value, str):
        step[name] = mutated(random, bytes.fromhex(value)).hex()
    elif name == "out" and value:
        step[name] = [mutated(random, bytes.fromhex(each)).hex() for each in value]
    elif name in ("offset", "features", "value"):
        step[name] = number(random, 128 if name == "features" else 64)
