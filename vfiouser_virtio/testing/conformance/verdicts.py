"""What comes out of a check."""

from dataclasses import dataclass
from enum import Enum
from typing import NoReturn


class Verdict(Enum):
    """The value is what reports show."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"
    BROKE = "broke the server"
    """It closed the connection, or stopped answering: a failure, too."""
    NOT_RUN = "not run"
    """The server did not come back after an earlier check."""


GOOD = frozenset({Verdict.PASS, Verdict.NOT_APPLICABLE})


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found; ``detail`` is why it is not a pass."""

    check_id: str
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0


class Failed(Exception):  # noqa: N818 - the verdict
    """The rule is broken; the message says what was seen, with values."""


class NotApplicable(Exception):  # noqa: N818
    """The device does not have what the rule is about; the message is the reason."""


def expect(kept: bool, otherwise: str) -> None:
    """Raise `Failed` with what was seen unless the rule is kept."""
    if not kept:
        raise Failed(otherwise)


def fail(seen: str) -> NoReturn:
    """Raise `Failed`."""
    raise Failed(seen)
