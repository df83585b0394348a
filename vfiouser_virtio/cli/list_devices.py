"""``list-devices``: the device types, and the options of each."""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.serving.terminal import say

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice
    from vfiouser_virtio.serving.options import Option

_HELP_COLUMN = 34


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "list-devices",
        summary="show the devices and their options",
        description="Show the devices that --device takes, and the options of each.",
        usage="[--json] [DEVICE …]",
        examples="  vfiouser-virtio list-devices\n"
        "  vfiouser-virtio list-devices blk\n"
        "  vfiouser-virtio list-devices my_device.py:MyDevice\n",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("names", nargs="*", metavar="DEVICE", help="only these; file.py:Class works too")
    add_log_arguments(parser, log_level="warning")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the list."""
    from vfiouser_virtio.serving.device_setup import (
        common_options,
        find_class,
        limit_options,
        offer_options,
        shipped_classes,
    )
    from vfiouser_virtio.serving.options import class_options

    if arguments.names:
        classes = {name: find_class(name) for name in arguments.names}
    else:
        classes = {device_class.name: device_class for device_class in shipped_classes()}
    every = [*common_options().values(), *limit_options().values(), *offer_options().values()]
    if arguments.json:
        devices = [
            {
                "name": name,
                **_ids(device_class),
                "description": summary(device_class),
                "options": _as_json(class_options(device_class).values()),
            }
            for name, device_class in classes.items()
        ]
        say(json.dumps({"devices": devices, "common-options": _as_json(every)}, indent=2))
        return 0
    for name, device_class in classes.items():
        say(f"{name}: {summary(device_class)}")
        say(as_text(class_options(device_class).values()))
    for help_text in {common_help(device_class): None for device_class in classes.values()}:
        say(help_text)
    return 0


def common_help(device_class: "type[AnyDevice]") -> str:
    """The options that every device of this kind has, for people."""
    from vfiouser_virtio.serving.device_setup import (
        common_options,
        limit_options,
        offer_options,
        pci_common_options,
        pci_options,
    )
    from vfiouser_virtio.virtio import Device

    if not issubclass(device_class, Device):
        return (
            f"every PCI device of your own:\n{as_text(pci_common_options().values())}\n"
            f"what it tells of its driver:\n{as_text(pci_options().values())}"
        )
    offered = as_text(offer_options().values()).rstrip("\n")
    return (
        f"every device:\n{as_text(common_options().values())}\n"
        f"every device, how much it does at most (docs/limits.md):\n{as_text(limit_options().values())}\n"
        f"every device, what it offers to the guest's driver, which takes what it knows:\n{offered}"
    )


def _ids(device_class: "type[AnyDevice]") -> dict[str, object]:
    from vfiouser_virtio.virtio import Device

    if issubclass(device_class, Device):
        return {"virtio-id": int(device_class.device_id)}
    return {"pci-id": f"{device_class.identity.vendor:04x}:{device_class.identity.device:04x}"}


def summary(device_class: "type[AnyDevice]") -> str:
    """What a device class is, in one line: the first of its module's or of its own docstring."""
    text = sys.modules[device_class.__module__].__doc__ or device_class.__doc__ or device_class.__name__
    return text.strip().partition("\n")[0].rstrip(".")


def _as_json(options: "Iterable[Option]") -> list[dict[str, object]]:
    from vfiouser_virtio.serving.options import REQUIRED

    return [
        {
            "name": option.name,
            "type": option.kind.shown,
            "repeats": option.kind.repeats,
            "required": option.default is REQUIRED,
            "default": option.default if isinstance(option.default, bool | int | float | str) else None,
            "help": option.help,
        }
        for option in options
    ]


def as_text(options: "Iterable[Option]") -> str:
    """A line or more for each option, as wide as the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = ""
    for option in options:
        left = f"  {option.name}={option.kind.shown}" + (" (repeats)" if option.kind.repeats else "")
        text = "; ".join(filter(None, (option.help, _default(option))))
        wrapped = textwrap.wrap(text, max(width - _HELP_COLUMN, 30)) or [""]
        first = left.ljust(_HELP_COLUMN) + wrapped.pop(0) if len(left) < _HELP_COLUMN else left
        lines += "\n".join([first, *(" " * _HELP_COLUMN + line for line in wrapped)]).rstrip() + "\n"
    return lines


def _default(option: "Option") -> str:
    """What is not given is this; nothing where the help text has to say it."""
    from vfiouser_virtio.serving.options import REQUIRED

    if option.default is REQUIRED:
        return "required"
    if isinstance(option.default, bool):
        return f"default: {'on' if option.default else 'off'}"
    return "" if option.default in (None, "", ()) else f"default: {option.default}"
