"""Options of a device class, read from its constructor's annotations, and conversion of users' values to them."""

import inspect
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.fault_spec import FaultSpec
from vfiouser_virtio.virtio import Device
from vfiouser_virtio.virtio.options import Duration, Making, OneOf, Size

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice

REQUIRED = inspect.Parameter.empty
_ON = {"on", "yes", "true"}
_OFF = {"off", "no", "false"}
# Not compiled before they are needed: `re` keeps what it has compiled.
_SIZE = r"(?i:(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?)"
_DURATION = r"(\d+(?:\.\d*)?)(ms|s|)"
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Kind(NamedTuple):
    """Type of an option. ``convert`` takes text, or what JSON or TOML gave, and raises ValueError or TypeError."""

    shown: str
    """What help texts show after ``=``."""
    expected: str
    """What an error says was expected."""
    convert: Callable[[Any], object]
    repeats: bool = False
    """A list: the option may be given more than once."""
    switch: bool = False
    """The key alone means on."""


class Option(NamedTuple):
    """Option of a device: ``name`` as users write it, ``parameter`` as the constructor has it."""

    name: str
    parameter: str
    kind: Kind
    help: str
    default: object
    """`REQUIRED` when there is none."""
    classes: Mapping[str, Callable[..., Any]] = {}
    """It says which of these is made: see `OneOf`."""
    of: tuple[str, ...] = ()
    """It is an option of these of them, not of the device itself."""
    shares: tuple[str, ...] = ()
    """Parameters of the device that the one which is made gets too."""


def class_options(device_class: "type[AnyDevice]") -> Mapping[str, Option]:
    """The options of a device class: those parameters of its constructor whose type users can write.

    Raises ConfigError for annotations that name what does not exist, and for a parameter that cannot be given.
    """
    if device_class.__init__ is Device.__init__:
        return {}
    return options_of(device_class.__init__)


@lru_cache(128)
def options_of(constructor: Callable[..., Any], *, bound: bool = False) -> Mapping[str, Option]:
    """As `class_options`; ``bound``: it has no ``self``.

    Kept: to evaluate the annotations of one device's four tables takes 2 ms, and there may be a hundred devices.
    """
    try:
        hints = get_type_hints(constructor, include_extras=True)
    except Exception as error:  # an annotation is an expression of the author's, so it can raise anything
        raise ConfigError(f"{constructor.__qualname__}: bad annotation: {error}") from error
    options: dict[str, Option] = {}
    for parameter in list(inspect.signature(constructor).parameters.values())[0 if bound else 1 :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name, type(parameter.default))
        if (one_of := _marker(hint)) is not None:
            _add_classes(options, parameter, one_of, _help(hint))
            continue
        kind = kind_of(hint) if parameter.kind is not parameter.POSITIONAL_ONLY else None
        if kind is not None:
            name = spelled(parameter.name)
            options[name] = Option(name, parameter.name, kind, _help(hint), parameter.default)
        elif parameter.default is REQUIRED:
            raise ConfigError(
                f"{constructor.__qualname__}: no option can give {parameter.name}: annotate it as str, int, Size, …, "
                "or give it a default"
            )
    return options


def _marker(annotation: Any) -> OneOf | None:
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, OneOf)), None)


def _add_classes(options: dict[str, Option], parameter: inspect.Parameter, one_of: OneOf, help_text: str) -> None:
    """The option that chooses a class, and those of all the classes, each once."""
    chooser, classes = spelled(parameter.name), one_of.classes
    options[chooser] = Option(
        chooser,
        parameter.name,
        _choice(tuple(classes)),
        help_text,
        parameter.default,
        classes=classes,
        shares=one_of.shares,
    )
    theirs: dict[str, Option] = {}
    for name, constructor in classes.items():
        made: Any = constructor.__init__ if isinstance(constructor, type) else constructor  # type: ignore[misc] # a class's own
        for option in options_of(made, bound=made is constructor).values():
            if option.parameter in one_of.shares:
                continue
            known = theirs.get(option.name, option)
            if option.name in options or known.kind.shown != option.kind.shown:
                raise ConfigError(f"{constructor.__qualname__}: {option.name} is another option already")
            theirs[option.name] = known._replace(of=(*known.of, name))
    for name, option in theirs.items():
        whose = "" if option.of == tuple(classes) else f"{chooser}={'|'.join(option.of)}: "
        options[name] = option._replace(help=whose + option.help if option.help else "")


def _help(annotation: Any) -> str:
    texts = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((text for text in texts if isinstance(text, str)), "")


def spelled(name: str) -> str:
    """An option as users write it: ``num-queues``; ``num_queues`` is taken too. ``addr__path`` is ``addr.path``."""
    return name.strip("_").replace("__", ".").replace("_", "-")


def convert_options(
    options: Mapping[str, Option], given: Mapping[str, object], *, label: str, also: Iterable[str] = ()
) -> dict[str, Any]:
    """The constructor's keyword arguments for what the user has given, keyed by `Option.name` spelling or with ``_``.

    ``also`` are names to suggest from. Raises ConfigError, which names ``label``, for an unknown key, a value that is
    not of its type, a key that is missing or given twice.
    """
    arguments: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for key, value in given.items():
        option = options.get(spelled(key))
        if option is None:
            raise ConfigError(_unknown_option(label, key, options, also))
        into, name = (theirs, option.name) if option.of else (arguments, option.parameter)
        if name in into:
            raise ConfigError(f"{label}: {option.name} is given twice")
        into[name] = _convert(option, value, label)
    for option in options.values():
        if option.classes:
            _choose(option, options, arguments, theirs, label)
        elif option.default is REQUIRED and not option.of and option.parameter not in arguments:
            raise _missing(option, label)
    return arguments


def _choose(
    chooser: Option, options: Mapping[str, Option], arguments: dict[str, Any], given: Mapping[str, Any], label: str
) -> None:
    """Put what is to be made in place of its name: of the chosen class, or of that which an option is named after."""
    chosen = arguments.pop(chooser.parameter, None) or next((name for name in chooser.classes if name in given), None)
    for name in given:
        if chosen not in options[name].of:
            fitting = " or ".join(f"{chooser.name}={each}" for each in options[name].of)
            raise ConfigError(f"{label}: {name} goes with {fitting}" + (f", not with {chosen}" if chosen else ""))
    if chosen is None:
        if chooser.default is REQUIRED:
            raise _missing(chooser, label)
        return
    for name, option in options.items():
        if chosen in option.of and option.default is REQUIRED and name not in given:
            raise _missing(option, f"{label}: {chooser.name}={chosen}")
    theirs = {options[name].parameter: value for name, value in given.items()}
    theirs |= {name: arguments[name] for name in chooser.shares if name in arguments and _has(chooser, chosen, name)}
    arguments[chooser.parameter] = Making(chooser.classes[chosen], theirs)


def _has(chooser: Option, chosen: str, parameter: str) -> bool:
    return parameter in inspect.signature(chooser.classes[chosen]).parameters


def _missing(option: Option, label: str) -> ConfigError:
    help_text = f" ({option.help})" if option.help else ""
    return ConfigError(f"{label}: {option.name}={option.kind.shown} is missing{help_text}")


def _convert(option: Option, value: object, label: str) -> object:
    if value is None:  # a bare key
        if not option.kind.switch:
            raise ConfigError(f"{label}: {option.name} needs a value: {option.name}={option.kind.shown}")
        value = True
    if isinstance(value, list) and not option.kind.repeats:
        raise ConfigError(f"{label}: {option.name} is given {len(value)} times, expected {option.kind.expected}")
    try:
        return option.kind.convert(value)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
    except (ValueError, TypeError):
        shown = value if isinstance(value, str) else repr(value)
        raise ConfigError(f"{label}: {option.name}={shown}: expected {option.kind.expected}") from None


def _unknown_option(label: str, key: str, options: Mapping[str, Option], also: Iterable[str]) -> str:
    close = suggestion(spelled(key), [*options, *also])
    return f'{label}: no option "{key}"{close} (options: {", ".join([*options, *also])})'


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean "path"?``, or nothing when nothing is alike."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


# ---- how a value of each type is written -----------------------------------------------------------------------------


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
    match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
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
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    seconds = _number(value) if match is None else float(match[1]) / (1000 if match[2] == "ms" else 1)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return Duration(seconds)


def _fault(value: object) -> FaultSpec:
    from vfiouser_virtio.faults.spec import parse_fault  # only here: see `fault_spec`

    return parse_fault(value)


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
    FaultSpec: Kind("FAULT", "a fault such as used-never:at=3", _fault),
}
