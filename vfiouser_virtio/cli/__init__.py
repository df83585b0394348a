"""The command ``vfiouser-virtio``: one module per sub-command, and from every error to an exit status.

Only the module of the sub-command that is asked for is imported, and what is heavy (trio, the devices, the virtual
machine) only inside the functions that need it: help, mistakes and the ``ready`` line come faster.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from vfiouser_virtio import __version__
from vfiouser_virtio.cli.arguments import log_rate
from vfiouser_virtio.cli.exit_status import EXPLAINED, OutputError, status_of
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.groups import only
from vfiouser_virtio.serving.terminal import PROGRAM, complain, set_up_logging, set_up_streams

_COMMANDS = ("serve", "run", "qemu-args", "list-devices", "list-faults", "probe", "conform", "fuzz")

_EXAMPLES = """\
examples:
  boot a small Linux guest with a disk and entropy from Python, and look at them:
    vfiouser-virtio run --device blk,size=64M --device rng --exec 'lspci -nn; head -c 512 /dev/vda | md5sum'
  serve devices to a QEMU of your own, and print the arguments it needs:
    vfiouser-virtio serve --device blk,path=disk.img --device rng --device console,chardev=pty
  see what there is, and its options:
    vfiouser-virtio list-devices blk
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises only what is a bug, and SystemExit as argparse does."""
    set_up_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    # By hand: what argparse makes of "--" in a sub-command differs between versions of Python.
    own, qemu_options = given, None
    if "--" in given:
        at = given.index("--")
        own, qemu_options = given[:at], given[at + 1 :]
    if own[:1] == ["fuzz"] and ".py:" in "".join(own[1:2]):
        own = [own[0], "device", *own[1:]]  # fuzz my_chip.py:MyChip
    chosen = parser(own[:1] if own and own[0] in _COMMANDS else _COMMANDS)
    arguments, unknown = chosen.parse_known_args(own)
    if unknown:
        words = " ".join(unknown)
        hint = f" (a device is --device {unknown[0]})" if ".py:" in unknown[0] and unknown[0][0] != "-" else ""
        chosen.error(f"unrecognized arguments: {words}{hint}")
    if qemu_options is not None and not hasattr(arguments, "qemu_options"):
        chosen.error(f"{arguments.command}: nothing may follow --")
    arguments.qemu_options = qemu_options or []
    return execute(arguments)


def execute(arguments: argparse.Namespace) -> int:
    """Execute what was parsed, with its log on stderr; gives the exit status, also that of a user's mistake."""
    set_up_logging(arguments.log_level, log_rate(arguments))
    try:
        status: int = arguments.execute(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ConfigError, ExceptionGroup) as error:
        mistake = only(error, ConfigError)
        if mistake is None:
            raise
        complain(mistake, with_traceback=arguments.log_level == "debug")
        return status_of(mistake)
    except OSError as error:
        # Of what has no name: stdout. A file that is the user's mistake has become a ConfigError.
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain once more at its exit
        complain(mistake := OutputError(f"cannot write to stdout: {error.strerror}"), with_traceback=False)
        return status_of(mistake)
    return status


def parser(names: Sequence[str] = _COMMANDS) -> argparse.ArgumentParser:
    """The command line with these sub-commands; the man page and shell completion are made of it (`scripts/manual`)."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Virtio and PCI devices in Python, for an unmodified QEMU (10.1 or newer).",
        epilog=f"{_EXAMPLES}\n{EXPLAINED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in names:
        import_module(f"{__name__}.{name.replace('-', '_')}").add_parser(commands)
    return made
