"""The options of a device class, read off its constructor, and the user's values converted to them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.memory import UnsealedMemory
from vfiouser_virtio.serving.option_types import Kind, kind_of
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Device, Offer

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``name`` as users write it, ``parameter`` as the constructor has it."""

    name: str
    parameter: str
    kind: Kind
    help: str
    default: object
    """`REQUIRED` when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The options that every device has, whatever its class: its socket, its name, its face on the PCI bus."""

    id: Annotated[str | None, "name in log lines and QEMU arguments; default: blk0, blk1, rng0, …"] = None
    socket: Annotated[Path | None, "listen on this path; default: one in a new private folder"] = None
    ids: Annotated[Style | None, "identity on the PCI bus; default: that of --ids"] = None
    vectors: Annotated[int | None, "MSI-X vectors; 0 leaves INTx only; default: one per queue, and one"] = None
    vendor_id: Annotated[int | None, "PCI vendor, 16 bits; default: as ids says, also for the next ones"] = None
    device_id: Annotated[int | None, "PCI device, 16 bits"] = None
    subsystem_vendor_id: Annotated[int | None, "PCI subsystem vendor, 16 bits"] = None
    subsystem_id: Annotated[int | None, "PCI subsystem, 16 bits"] = None
    class_code: Annotated[int | None, "PCI class code, 24 bits"] = None
    revision: Annotated[int | None, "PCI revision, 8 bits; a modern virtio device has at least 1"] = None
    unsealed_memory: Annotated[
        UnsealedMemory,
        "guest memory whose file can become shorter under us, which would kill this process (anything but a sealed "
        "memfd): map it (fast), copy from and to it (safe and slow), or refuse it; auto: map it for clients of our own "
        "user, copy it for others",
    ] = "auto"


def common_options() -> dict[str, Option]:
    """The table of `CommonOptions`."""
    return _options_of(CommonOptions.__init__)


def offer_options() -> dict[str, Option]:
    """The table of `Offer`: what the driver of any device may choose from."""
    return _options_of(Offer.__init__)


def class_options(device_class: type[Device]) -> dict[str, Option]:
    """The options of a device class: those parameters of its constructor whose type users can write.

    Raises ConfigError for annotations that name what does not exist, and for a parameter that nobody could give.
    """
    if device_class.__init__ is Device.__init__:
        return {}
    return _options_of(device_class.__init__)


def _options_of(constructor: Callable[..., None]) -> dict[str, Option]:
    try:
        hints = get_type_hints(constructor, include_extras=True)
    except Exception as error:  # an annotation is an expression of the author's, so it can raise anything
        raise ConfigError(f"{constructor.__qualname__}: bad annotation: {error}") from error
    options = {}
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name, type(parameter.default))
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


def _help(annotation: Any) -> str:
    texts = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((text for text in texts if isinstance(text, str)), "")


def spelled(name: str) -> str:
    """An option as users write it: ``num-queues``; ``num_queues`` is taken too."""
    return name.strip("_").replace("_", "-")


def convert_options(
    options: Mapping[str, Option], given: Mapping[str, object], *, label: str, also: Iterable[str] = ()
) -> dict[str, Any]:
    """The constructor's keyword arguments for what the user has given, keyed by `Option.name` spelling or with ``_``.

    ``also`` are names to suggest from. Raises ConfigError, which names ``label``, for an unknown key, a value that is
    not of its type, a key that is missing or given twice.
    """
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        option = options.get(spelled(key))
        if option is None:
            raise ConfigError(_unknown_option(label, key, options, also))
        if option.parameter in arguments:
            raise ConfigError(f"{label}: {option.name} is given twice")
        arguments[option.parameter] = _convert(option, value, label)
    for option in options.values():
        if option.default is REQUIRED and option.parameter not in arguments:
            help_text = f" ({option.help})" if option.help else ""
            raise ConfigError(f"{label}: {option.name}={option.kind.shown} is missing{help_text}")
    return arguments


def _convert(option: Option, value: object, label: str) -> object:
    if value is None:  # a bare key
        if not option.kind.switch:
            raise ConfigError(f"{label}: {option.name} needs a value: {option.name}={option.kind.shown}")
        value = True
    if isinstance(value, list) and not option.kind.repeats:
        raise ConfigError(f"{label}: {option.name} is given {len(value)} times, expected {option.kind.expected}")
    try:
        return option.kind.convert(value)
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
