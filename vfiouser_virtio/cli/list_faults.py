"""``list-faults``: what a device can be asked to do wrong, with ``fault=``."""

import argparse
import json
import shutil
import textwrap
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.terminal import say

if TYPE_CHECKING:
    from vfiouser_virtio.faults import Fault

_SCHEDULE = """\
fault=NAME[:KEY=VALUE]…, any number of times for a device; without a schedule a fault happens each time that it can:
  p=0.01      with this probability, as fault-seed=N decides
  at=3        at the third time; at=3+7+9 at several
  every=10    each tenth time
  after=100   not before that
  count=5     no more often
  queue=0     on this queue only; else each queue has its own count
at=, every= and after= can be times after DRIVER_OK, too: at=5s, every=200ms. Then a fault happens at the first
opportunity after that; those that "happen by time alone" wait for none.
"""


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "list-faults",
        summary="show what devices can do wrong on purpose",
        description="Show the faults that fault= of --device takes, to test drivers with (docs/evil.md).",
        usage="[--json] [FAULT …]",
        examples="  vfiouser-virtio list-faults\n"
        "  vfiouser-virtio list-faults used-late\n"
        "  vfiouser-virtio run --device blk,size=64M,fault=used-id-out-of-range:at=100 --exec 'cat /dev/vda'\n",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("names", nargs="*", metavar="FAULT", help="only these")
    add_log_arguments(parser, log_level="warning")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the list."""
    from vfiouser_virtio.faults import FAULTS
    from vfiouser_virtio.faults.profiles import PROFILES

    if unknown := set(arguments.names) - set(FAULTS):
        raise ConfigError(f'no fault "{min(unknown)}" (faults: {", ".join(FAULTS)})')
    chosen = [fault for name, fault in FAULTS.items() if name in arguments.names or not arguments.names]
    if arguments.json:
        profiles = {name: {"is-like": each.is_like, "faults": each.faults} for name, each in PROFILES.items()}
        say(json.dumps({"faults": [_as_json(fault) for fault in chosen], "profiles": profiles}, indent=2))
        return 0
    place = None
    for fault in chosen:
        if fault.place is not place:
            place = fault.place
            say(f"{place.value}:")
        say(as_text(fault))
    if not arguments.names:
        say("profiles, several faults by one name (fault=profile:NAME):")
        for name, profile in PROFILES.items():
            say(f"  {name}\n" + _wrapped(f"{profile.is_like}: {', '.join(profile.faults)}"))
        say(_SCHEDULE)
    return 0


def as_text(fault: "Fault") -> str:
    """A fault for people, as wide as the terminal."""
    only = [f"on a {fault.ring} ring"] if fault.ring else []
    only += [f"for {fault.devices}"] if fault.devices != "any" else []
    only += [f"over {fault.transport}"] if fault.transport != "any" else []
    breaks = f"breaks {fault.section}: {fault.breaks}" if not fault.breaks.startswith("none") else "breaks no rule"
    lines = [f"  {fault.name}", _wrapped(fault.does + (f" (only {' and '.join(only)})" if only else ""))]
    by_time = ", or happens by time alone" if fault.by_itself else ""
    lines.append(_wrapped(f"counts each {fault.per}{by_time}; {breaks}"))
    for argument in fault.arguments:
        default = "" if argument.default in (None, "") else f"; default: {_shown(argument.default)}"
        lines.append(_wrapped(f"{argument.name}={argument.shown}: {argument.help}{default}"))
    return "\n".join(lines)


def _shown(default: object) -> str:
    return f"{default * 1000:g}ms" if isinstance(default, float) else str(default)


def _wrapped(text: str) -> str:
    width = shutil.get_terminal_size((120, 24)).columns
    return textwrap.fill(text, max(width, 50), initial_indent="      ", subsequent_indent="        ")


def _as_json(fault: "Fault") -> dict[str, object]:
    return {
        "name": fault.name,
        "place": fault.place.value,
        "counts": fault.per,
        "does": fault.does,
        "breaks": fault.breaks,
        "section": fault.section,
        "of-queue": fault.of_queue,
        "by-itself": fault.by_itself,
        "ring": fault.ring,
        "devices": fault.devices,
        "transport": fault.transport,
        "arguments": [
            {"name": each.name, "type": each.shown, "default": each.default, "help": each.help}
            for each in fault.arguments
        ],
    }
