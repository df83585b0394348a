"""Findings of an audit: which rules a driver has broken, how often, and what was seen the first time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from vfiouser_virtio.audit.rule import Rule
from vfiouser_virtio.device_log import DeviceLog, printable

_P = ParamSpec("_P")
_Seen = TypeVar("_Seen")

logger = logging.getLogger(__name__)

# What was seen is a sentence with some numbers; a driver decides about a few of them.
_MAX_SEEN = 500
# A driver can begin as many as it likes.
_MAX_RUNS = 64


@dataclass(slots=True)
class BrokenRule:
    """Broken rule."""

    rule: Rule
    first: str
    """What was seen the first time, in words, values in hex."""
    faults: str = ""
    """Of a device with faults: what it had done wrong by then."""
    count: int = 1
    runs: set[int] = field(default_factory=set)
    """Numbers of the driver runs in which it was seen: each begins when a driver sets status bits after a reset."""


class Findings:
    """Findings about the drivers of one device: no more entries than there are rules, whatever a driver does.

    ``told`` is called with each finding the first time.
    """

    def __init__(self, device: str = "", told: Callable[[BrokenRule], None] | None = None) -> None:
        self.device = device
        self.by_rule: dict[str, BrokenRule] = {}
        self.run = 0
        """Number of the driver run, from 1 on: firmware's comes before that of the system that it boots."""
        self.faults: Callable[[], str] = str
        """What the device has done wrong until now, in words; nothing, of an honest one."""
        self.switched_off: dict[str, str] = {}
        """Watch to the bug that it has shown, in words: it looks at nothing more."""
        self._told = told

    def tell(self, look: Callable[_P, _Seen], *args: _P.args, **kwargs: _P.kwargs) -> _Seen | None:
        """Call a method of a watch, and return what it does; None if the watch is switched off.

        An exception in it is a bug in this package, which the device and its driver must not notice: it is logged with
        its traceback, and switches off all watches of that class of this device.
        """
        watch = type(getattr(look, "__self__", look)).__name__
        if watch in self.switched_off:
            return None
        try:
            return look(*args, **kwargs)
        except Exception as error:
            self.switched_off[watch] = printable(f"{type(error).__name__}: {error}")[:_MAX_SEEN]
            said = "a bug in the audit: %s is switched off, the device goes on"
            DeviceLog(logger, self.device).error(said, watch, exc_info=error)
            return None

    def broke(self, rule: Rule, seen: str) -> None:
        """The driver has broken this rule."""
        known = self.by_rule.get(rule.id)
        if known is not None:
            known.count += 1
            if len(known.runs) < _MAX_RUNS:
                known.runs.add(self.run)
            return
        finding = self.by_rule[rule.id] = BrokenRule(rule, printable(seen)[:_MAX_SEEN], self.faults(), runs={self.run})
        if self._told is not None:
            self._told(finding)

    def all(self) -> list[BrokenRule]:
        """The findings, those of MUST rules first, in the order in which they were made."""
        return sorted(self.by_rule.values(), key=lambda finding: finding.rule.keyword != "MUST")


class AuditLog:
    """Findings of all devices that are served together, by the device's id."""

    def __init__(self) -> None:
        self.devices: dict[str, Findings] = {}

    def of(self, device: str, told: Callable[[BrokenRule], None] | None = None) -> Findings:
        """The findings of a device, to be filled."""
        return self.devices.setdefault(device, Findings(device, told))

    @property
    def must_broken(self) -> int:
        """How many MUST rules were broken, counted for each device."""
        return sum(each.rule.keyword == "MUST" for found in self.devices.values() for each in found.by_rule.values())
