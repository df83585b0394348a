"""Verdict of a conformance check."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn


class Verdict(Enum):
    """Verdict of a check; the value is what reports show."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    ADVICE = "advice"
    """What no specification has a MUST for could be better: no server fails for it."""
    NOT_APPLICABLE = "not applicable"
    BROKE = "broke the server"
    """It closed the connection, stopped answering, or died: a failure, too."""
    NOT_RUN = "not run"
    """The rule could not be looked at: the server did not come back after an earlier check, or the request failed."""


GOOD = frozenset({Verdict.PASS, Verdict.ADVICE, Verdict.NOT_APPLICABLE})


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one check; ``detail`` is why it is not a pass."""

    check_id: str
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0


class Failed(Exception):
    """Broken rule; the message says what was seen, with values."""


class NotApplicable(Exception):
    """Rule about something that the device does not have; the message is the reason."""


class ExerciseFailed(Exception):
    """Failure of the plain request that a rule is to be seen by, which says nothing of the rule."""

    rule = "virtio14/RQ1"
    """The check that says so."""


class FrameLost(ExerciseFailed):
    """Plain frame that does not get from one network device to the other."""

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


FINDINGS: ContextVar[list[str]] = ContextVar("findings")
"""What `note` has seen in the check that runs."""


def note(kept: bool, otherwise: str) -> None:
    """Unless the rule is kept, remember what was seen, and go on: the check fails in the end, with all of it."""
    if not kept:
        FINDINGS.get().append(otherwise)


def expect(kept: bool, otherwise: str) -> None:
    """Raise `Failed` with what was seen unless the rule is kept: nothing more can be looked at then."""
    if not kept:
        raise Failed(otherwise)


def fail(seen: str) -> NoReturn:
    """Raise `Failed`."""
    raise Failed(seen)
