"""Faults as users ask for them: ``used-len-long:p=0.01:queue=0``, a mapping in JSON and TOML, or a profile.

::

    NAME[:KEY=VALUE]…      one fault
    profile:NAME           several, of a table
    replay:FILE            those of a log, at the same places

===========  ========================================================================================================
key          meaning; what is counted is the declaration's ``per``
===========  ========================================================================================================
``p``        probability, 0 to 1
``at``       the first is 1; several are ``3+7+9``
``every``    each n-th
``after``    none of the first n
``count``    no more than n times
``queue``    only this queue; without it each queue has its own count
===========  ========================================================================================================

Those that are given must all hold; without any it is always. ``at``, ``every`` and ``after`` can be times as well, in
seconds since DRIVER_OK: ``at=5s``, ``every=200ms``.
"""

from collections.abc import Mapping
from typing import Any

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.catalogue import FAULTS
from vfiouser_virtio.faults.declaration import MADE, integer, seconds, text
from vfiouser_virtio.faults.fault_spec import COLLECTIONS, FaultSpec


def parse_fault(value: object) -> FaultSpec:
    """The fault of a text, or of a mapping with its name as ``fault``. Raises ConfigError, and TypeError for others."""
    if isinstance(value, FaultSpec):
        return value
    if isinstance(value, str):
        name, *pairs = value.split(":")
        if name in COLLECTIONS:
            which = value.removeprefix(f"{name}:")
            if not pairs or not which:
                raise ConfigError(f"fault={value}: which {name}? for example fault={name}:{_EXAMPLES[name]}")
            return FaultSpec(name, which, text=value)
        given: dict[str, object] = {}
        for pair in pairs:
            key, equals, word = pair.partition("=")
            if not equals or key in given:
                raise ConfigError(f"fault={value}: {key or 'a colon'}: expected KEY=VALUE after each colon, each once")
            given[key] = word
        return _spec(name, given, f"fault={value}")
    if not isinstance(value, Mapping):
        raise TypeError
    given = dict(value)
    said = given.pop("fault", None)
    if not isinstance(said, str):
        raise ConfigError(f'fault {value!r}: there is no name, for example {{"fault": "used-never", "at": 3}}')
    if said in COLLECTIONS and set(given) == {"which"} and isinstance(given["which"], str):
        return FaultSpec(said, given["which"], text=f"{said}:{given['which']}")
    return _spec(said, given, f"fault {said}")


_EXAMPLES = {"profile": "malicious", "replay": "faults.jsonl"}


def _spec(name: str, given: dict[str, object], where: str) -> FaultSpec:
    fault = FAULTS.get(name)
    if fault is None:
        raise ConfigError(f'{where}: no fault "{name}"{_close(name)}; vfiouser-virtio list-faults shows all')
    known = {argument.name: argument for argument in fault.arguments}
    common: dict[str, Any] = {}
    arguments = {argument.name: argument.default for argument in fault.arguments}
    for key, value in given.items():
        try:
            if key in known:
                arguments[key] = known[key].convert(value)
            elif key in _TIMES and _is_time(value):
                common[_TIMES[key]] = _times(key, value)
            elif key in _COMMON and (key != "queue" or fault.of_queue):
                common[key] = _COMMON[key][0](value)
            else:
                also = ", ".join([*known, *(key for key in _COMMON if key != "queue" or fault.of_queue)])
                raise ConfigError(f'{where}: {name} has no "{key}" (it has {also})')
        except (ValueError, TypeError):
            expected = (
                f"{_COMMON[key][1]}{_OR_TIME if key in _TIMES else ''}"
                if key not in known
                else f"as in {key}={known[key].shown}: {known[key].help}"
            )
            raise ConfigError(f"{where}: {key}={value}: expected {expected}") from None
    if "field" in arguments and arguments["field"] is None:
        raise ConfigError(f"{where}: {name} needs field=NAME")
    if fault.per == MADE and _TIMES.values() & common.keys():
        raise ConfigError(f"{where}: {name} is there from the beginning, when there is no time yet")
    written = "".join(f":{key}={_written(value)}" for key, value in given.items())
    return FaultSpec(name, arguments=arguments, text=f"{name}{written}", **common)


def _close(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, [*FAULTS, *COLLECTIONS], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _written(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError
    return number


def _from(lowest: int, value: object) -> int:
    number = integer(value)
    if number < lowest:
        raise ValueError
    return number


def _places(value: object) -> frozenset[int]:
    entries = text(value).split("+") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return frozenset(_from(1, entry) for entry in entries)


_TIMES = {"at": "at_times", "every": "every_time", "after": "after_time"}
"""Keys that can be times, and what they are then."""
_OR_TIME = "; or a time from 1ms after DRIVER_OK, such as 5s"


def _is_time(value: object) -> bool:
    """Whether there is a unit anywhere in it."""
    entries = value if isinstance(value, list) else [value]
    return any(isinstance(entry, str) and "s" in entry for entry in entries)


def _times(key: str, value: object) -> object:
    entries = value if isinstance(value, list) else text(value).split("+")
    if not all(isinstance(entry, str) and entry.endswith("s") for entry in entries):
        raise ValueError  # some of them are counts
    times = [seconds(entry) for entry in entries]
    if min(times) < SHORTEST_TIME:
        raise ValueError
    if key == "at":
        return frozenset(times)
    [time] = times
    return time


SHORTEST_TIME = 0.001
"""Seconds: more often than that a device would do nothing else."""

_COMMON = {
    "p": (_probability, "a probability from 0 to 1"),
    "at": (_places, "a number from 1, or several: 3+7+9"),
    "every": (lambda value: _from(1, value), "a number from 1"),
    "after": (lambda value: _from(0, value), "a number from 0"),
    "count": (lambda value: _from(1, value), "a number from 1"),
    "queue": (lambda value: _from(0, value), "a queue's number from 0"),
}
