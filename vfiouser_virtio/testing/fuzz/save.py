"""Corpus files of what was found."""

from dataclasses import replace
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.oracle import Finding

_LONGEST_NAME = 120


def save(case: Case, finding: Finding, folder: Path) -> Path:
    """Write a corpus file; its name says what and where, for a human to improve. Raises ConfigError."""
    words = f"{finding.kind}-{finding.where}"
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in words).split())[:_LONGEST_NAME]
    # It may be that of a case of another's, and is no way out of the folder.
    origin = "".join(letter if letter.isalnum() or letter in " ._" else "-" for letter in case.origin)[:_LONGEST_NAME]
    path = folder / f"{name}-{origin}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(replace(case, shows=shown_by(finding)).dumps())
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from None
    return path


def shown_by(finding: Finding) -> str:
    """What a case shows, in one line: the first one of a server's finding, the last one of a traceback."""
    lines = finding.what.strip().splitlines() or [""]
    return lines[-1 if finding.kind == "bug" else 0][:200]


def load(path: Path) -> Case:
    """A corpus file. Raises ConfigError for what is none."""
    try:
        return Case.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no fuzz case: {error}") from None
