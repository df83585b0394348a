"""``list-devices``: the devices there are, and the options of each."""

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
    from vfiouser_virtio.serving.device_options import Option
    from vfiouser_virtio.virtio import Device

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
    from vfiouser_virtio.serving.device_options import class_options, common_options, offer_options
    from vfiouser_virtio.serving.device_setup import find_class, shipped_classes

    if arguments.names:
        classes = {name: find_class(name) for name in arguments.names}
    else:
        classes = {device_class.name: device_class for device_class in shipped_classes()}
    common, offered = common_options().values(), offer_options().values()
    if arguments.json:
        devices = [
            {
                "name": name,
                "virtio-id": int(device_class.device_id),
                "description": _summary(device_class),
                "options": _as_json(class_options(device_class).values()),
            }
            for name, device_class in classes.items()
        ]
        say(json.dumps({"devices": devices, "common-options": _as_json([*common, *offered])}, indent=2))
        return 0
    width = shutil.get_terminal_size((120, 24)).columns
    for name, device_class in classes.items():
        say(f"{name}: {_summary(device_class)}")
        say(_as_text(class_options(device_class).values(), width))
    say("every device:")
    say(_as_text(common, width))
    say("every device, what it offers to the guest's driver, which takes what it knows:")
    say(_as_text(offered, width).rstrip("\n"))
    return 0


def _summary(device_class: "type[Device]") -> str:
    text = sys.modules[device_class.__module__].__doc__ or device_class.__doc__ or device_class.__name__
    return text.strip().partition("\n")[0].rstrip(".")


def _as_json(options: "Iterable[Option]") -> list[dict[str, object]]:
    from vfiouser_virtio.serving.device_options import REQUIRED

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


def _as_text(options: "Iterable[Option]", width: int) -> str:
    lines = ""
    for option in options:
        left = f"  {option.name}={option.kind.shown}" + " (repeats)" * option.kind.repeats
        text = "; ".join(filter(None, (option.help, _default(option))))
        wrapped = textwrap.wrap(text, max(width - _HELP_COLUMN, 30)) or [""]
        first = left.ljust(_HELP_COLUMN) + wrapped.pop(0) if len(left) < _HELP_COLUMN else left
        lines += "\n".join([first, *(" " * _HELP_COLUMN + line for line in wrapped)]).rstrip() + "\n"
    return lines


def _default(option: "Option") -> str:
    """What is not given is this; nothing where the help text has to say it."""
    from vfiouser_virtio.serving.device_options import REQUIRED

    if option.default is REQUIRED:
        return "required"
    if isinstance(option.default, bool):
        return f"default: {'on' if option.default else 'off'}"
    return "" if option.default in (None, "", ()) else f"default: {option.default}"
