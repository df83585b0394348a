"""How a value of each type is written by users: on the command line, or in JSON and TOML."""

import os
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vfiouser_virtio.virtio.options import Duration, Size

_ON = {"on", "yes", "true"}
_OFF = {"off", "no", "false"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ms|s|)")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of option. ``convert`` takes text, or what JSON or TOML gave, and raises ValueError or TypeError."""

    shown: str
    """What help texts show after ``=``."""
    expected: str
    """What an error says was expected."""
    convert: Callable[[Any], object]
    repeats: bool = False
    """A list: the option may be given more than once."""
    switch: bool = False
    """The key alone means on."""


def kind_of(annotation: Any) -> Kind | None:
    """The kind for a parameter's annotation; None for what users cannot write."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin in (Union, types.UnionType):
        return _one_of([kind_of(argument) for argument in arguments if argument is not types.NoneType])
    if origin is Literal:
        return _choice(arguments)
    if origin in (list, tuple, Sequence):
        return _many(kind_of(arguments[0])) if origin is not tuple or arguments[1:] == (...,) else None
    return _KINDS.get(origin or annotation)


def _choice(values: tuple[object, ...]) -> Kind:
    by_text = {str(value): value for value in values}

    def convert(value: object) -> object:
        try:
            return by_text[str(value)]
        except KeyError:
            raise ValueError from None

    return Kind("|".join(by_text), f"one of {', '.join(by_text)}", convert)


def _one_of(kinds: list[Kind | None]) -> Kind | None:
    """The first of several types that takes a value; those that users cannot write are left out."""
    known = [kind for kind in kinds if kind is not None]

    def convert(value: object) -> object:
        for kind in known:
            try:
                return kind.convert(value)
            except (ValueError, TypeError):
                continue
        raise ValueError

    if len(known) < 2:
        return known[0] if known else None
    return Kind(
        "|".join(dict.fromkeys(kind.shown for kind in known)),
        " or ".join(dict.fromkeys(kind.expected for kind in known)),
        convert,
        repeats=any(kind.repeats for kind in known),
        switch=any(kind.switch for kind in known),
    )


def _many(kind: Kind | None) -> Kind | None:
    if kind is None:
        return None

    def convert(value: object) -> object:
        return [kind.convert(entry) for entry in (value if isinstance(value, list) else [value])]

    return Kind(kind.shown, f"{kind.expected}, or several of them", convert, repeats=True)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: object) -> Path:
    if not _text(value) or "\0" in _text(value):
        raise ValueError
    return Path(_text(value))


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = _text(value).lower()
    if word not in _ON | _OFF:
        raise ValueError
    return word in _ON


def _integer(value: object) -> int:
    if isinstance(value, str):
        return int(value, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return float(value)


def to_size(value: object) -> Size:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        plain = _integer(value)
        if plain < 0:
            raise ValueError
        return Size(plain)
    # No float, which is exact up to 2**53 only.
    whole, _, decimals = match[1].partition(".")
    size, rest = divmod(int(whole + decimals) * 1024 ** _POWERS[match[2].upper()], 10 ** len(decimals))
    if rest:
        raise ValueError
    return Size(size)


def _duration(value: object) -> Duration:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    seconds = _number(value) if match is None else float(match[1]) / (1000 if match[2] == "ms" else 1)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return Duration(seconds)


_KINDS: dict[Any, Kind] = {
    str: Kind("TEXT", "a text", _text),
    bytes: Kind("TEXT", "a text", lambda value: _text(value).encode()),
    Path: Kind("PATH", "a path", _path),
    os.PathLike: Kind("PATH", "a path", _path),
    bool: Kind("on|off", "on or off", _switch, switch=True),
    int: Kind("N", "a whole number such as 4 or 0x1af4", _integer),
    float: Kind("NUMBER", "a number", _number),
    Size: Kind("SIZE", "a size in bytes such as 512, 64M or 1.5G", to_size),
    Duration: Kind("TIME", "a time such as 2s or 50ms", _duration),
}
