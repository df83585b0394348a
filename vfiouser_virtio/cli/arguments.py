"""Command line arguments of several sub-commands, and the base of all parsers."""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from vfiouser_virtio.cli.exit_status import EXPLAINED
from vfiouser_virtio.errors import ConfigError

if TYPE_CHECKING:
    from vfiouser_virtio.cli.audit_report import AuditReport
    from vfiouser_virtio.serving.serve import Serving

LOG_RATE = 10
"""Lines a second of each device, unless the user says another number."""
VERBOSE_LOG_RATE = 100
"""The same where all that a driver does is logged: a firmware maps and unmaps memory some 200 times."""


_NO_UID = 2**32 - 1
"""What system calls take for "as it is"; no user has it."""


class SubParsers(Protocol):
    """Type of what ``add_subparsers()`` returns, which argparse gives no public name."""

    def add_parser(self, name: str, **kwargs: object) -> argparse.ArgumentParser: ...


def add_command(
    commands: SubParsers, name: str, *, summary: str, description: str, usage: str, examples: str, under: str = ""
) -> argparse.ArgumentParser:
    """A sub-command's parser, with its examples and the exit status at the end of its help.

    ``description`` comes in lines of up to 100 characters. ``under`` is the command that this is a part of.
    """
    return commands.add_parser(
        name,
        help=summary,
        usage=f"vfiouser-virtio {under and f'{under} '}{name} {usage}",
        description=description,
        epilog=f"examples:\n{examples}\n{EXPLAINED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--config``."""
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="DEVICE[,KEY=VALUE,…]",
        help="a device: its name or virtio device id, or file.py:Class for one of your own, and its options "
        "(see list-devices); "
        '\',,\' stands for a comma in a value; JSON is taken too: \'{"driver": "blk", "path": "disk.img"}\'',
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a TOML file with a [[device]] table for each, or the same as a .json file",
    )


def add_socket_arguments(parser: argparse.ArgumentParser) -> None:
    """Where devices are served, for how long, and who is told."""
    parser.add_argument(
        "--socket",
        action="append",
        dest="places",
        metavar="PATH",
        help="listen on this path; may be repeated, for one device after another (default: in a new private folder)",
    )
    parser.add_argument(
        "--fd",
        action="append",
        dest="places",
        type=int,
        metavar="N",
        help="take over this file descriptor, a UNIX socket that listens or is connected; likewise. "
        "systemd's socket activation (LISTEN_FDS) is understood too",
    )
    parser.add_argument(
        "--allow-uid",
        action="extend",
        dest="allow_uids",
        type=_uids,
        metavar="USER[,USER…]",
        help="refuse clients of all other users, root too; numbers or user names (default: all who may open the "
        "socket: for one that the server makes, its own user and root). It opens no socket to more users: see "
        "docs/security.md",
    )
    parser.add_argument("--once", action="store_true", help="serve one client per device, and end when all have left")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this file descriptor when ready")
    parser.add_argument("--json", action="store_true", help="stdout for programs")
    parser.add_argument(
        "--run-as",
        metavar="USER[:GROUP]",
        help="of root: open files and sockets, then become this user without other groups; the sockets are the user's. "
        "The processes that hold those of --processes and --supervise stay root's",
    )
    parser.add_argument(
        "--sandbox",
        nargs="?",
        const="strict",
        choices=("strict", "best-effort", "off"),
        help="once the devices are made, give up all rights that they do not need: no new privileges, no capabilities, "
        "files by Landlock, system calls by seccomp (docs/security.md). With best-effort also where the kernel lacks "
        "some of it (default: off; best-effort with --supervise; strict where --sandbox has no value)",
    )


def add_serving_arguments(parser: argparse.ArgumentParser, *, log_level: str, several: bool = True) -> None:
    """How devices are served; ``several`` are with options that mean nothing for one."""
    parser.add_argument(
        "--ids",
        choices=("default", "2007", "qemu"),
        default="default",
        help="what the devices show on the PCI bus: 1af4:104x with subsystem 5000:104x (default), vendor 5000 as in "
        "the virtio draft of 2007, or exactly what QEMU's own virtio devices show",
    )
    parser.add_argument(
        "--engine",
        choices=("vfio-user", "libvfio-user"),
        default="vfio-user",
        help="what speaks the protocol: our own code (default), or the C library libvfio-user, which you have built; "
        "it needs guest memory that is shared, and listens itself (no --fd): docs/libvfio-user.md",
    )
    parser.add_argument(
        "--libvfio-user",
        metavar="FILE",
        help="the libvfio-user.so of --engine libvfio-user (default: $LIBVFIO_USER, else where the loader looks)",
    )
    if several:
        parser.add_argument(
            "--processes",
            action="store_true",
            help="a process for each device, so that a busy one does not slow the others; 6 MB each",
        )
        parser.add_argument(
            "--supervise",
            action="store_true",
            help="a process for each device, and another that holds its client: when the first dies or hangs, it is "
            "started again, and goes on where it was: the VM lives (docs/supervision.md)",
        )
        parser.add_argument(
            "--hang-after",
            type=_seconds,
            metavar="SECONDS",
            help="with --supervise: kill a device's process that has not answered for so long; 0: never (default: 3; "
            "QEMU itself gives up a device after 5)",
        )
        parser.add_argument(
            "--max-memory",
            type=_size,
            metavar="SIZE",
            help="with --supervise: kill a device's process that has more memory of its own, without files and the "
            "guest's (docs/limits.md)",
        )
    parser.add_argument(
        "--write-multiple", action="store_true", help="offer REGION_WRITE_MULTI to clients that can use it"
    )
    add_log_arguments(parser, log_level=log_level)
    parser.add_argument(
        "--log-rate",
        type=_line_rate,
        metavar="LINES",
        help="log this many lines a second of each device, and ten times as many at once: no guest and no client can "
        f"fill a disk with what it does wrong. What was dropped is counted and said; 0: no limit (default: {LOG_RATE}, "
        f"and {VERBOSE_LOG_RATE} with -v)",
    )

    parser.add_argument(
        "--audit",
        nargs="?",
        const="",
        metavar="FILE",
        help="watch what drivers do against the rules that virtio 1.4 has for them, and say in the end which were "
        "broken, how often, and what was seen first: on stderr, or in FILE (JSON if it is called FILE.json). The exit "
        "status is 8 when a MUST was broken. Devices are slower for it, and no driver notices (docs/audit.md)",
    )
    parser.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="write every message between clients and devices, decoded, to FILE or stderr: registers by name, with "
        "times and connections; guests' data is in it. It slows a device down, and changes nothing else. FILE is no "
        "symbolic link; /dev/stdout and /dev/fd/N are what the shell has opened, as with --trace=>(gzip >x)",
    )
    parser.add_argument(
        "--trace-format",
        choices=("text", "json"),
        help="of --trace: lines for people, or a JSON object a line (default: json for FILE.json and FILE.jsonl)",
    )
    parser.add_argument(
        "--trace-limit",
        type=_size,
        default=1 << 30,
        metavar="SIZE",
        help="end the trace after so many bytes (default: 1G)",
    )


def log_rate(arguments: argparse.Namespace) -> float:
    """Lines a second of each device: ``--log-rate``, or what suits the level; 0, no limit, for what serves none."""
    if "log_rate" not in arguments:
        return 0
    by_level = VERBOSE_LOG_RATE if arguments.log_level == "debug" else LOG_RATE
    return by_level if arguments.log_rate is None else float(arguments.log_rate)


def server_of(
    arguments: argparse.Namespace,
    abandoned: list[Callable[[], None]],
    *,
    not_for_children: Sequence[int] = (),
    audit: "AuditReport | None" = None,
    **options: Any,
) -> "Callable[..., AbstractContextManager[AbstractAsyncContextManager[Serving]]]":
    """`serve`, or `serve_in_processes`, as `add_serving_arguments` says: to be called with the devices' descriptions.

    What that returns is entered before ``trio.run``, and what it gives inside of it. ``audit`` is what `audit_of`
    gives. The rest is as with these two. Raises ConfigError, as does the call.
    """
    options |= {name: getattr(arguments, name) for name in ("ids", "write_multiple", "engine", "libvfio_user")}
    if audit is not None:
        for option in ("processes", "supervise"):
            if getattr(arguments, option, False):
                raise ConfigError(f"--audit: not with --{option}, whose devices are in processes of their own")
        options["audit"] = audit.log
    if arguments.trace is not None:
        from vfiouser_virtio.serving.trace import TraceLog, wants_json

        if arguments.engine == "libvfio-user":  # before a file is made
            raise ConfigError("--trace: libvfio-user does not show its messages; use --engine vfio-user")
        as_json = wants_json(arguments.trace, arguments.trace_format)
        options["open_trace"] = TraceLog(arguments.trace, as_json=as_json, limit=arguments.trace_limit)
    options["allow_uids"] = getattr(arguments, "allow_uids", None)
    supervise, hang_after = getattr(arguments, "supervise", False), getattr(arguments, "hang_after", None)
    max_memory: int | None = getattr(arguments, "max_memory", None)
    for name, value in (("--hang-after", hang_after), ("--max-memory", max_memory)):
        if value is not None and not supervise:
            raise ConfigError(f"{name} is for --supervise, which was not asked for")
    if supervise:
        from vfiouser_virtio.serving.keeper.keep import HANG_AFTER_S, Supervision

        hang_after = HANG_AFTER_S if hang_after is None else hang_after
        options["supervision"] = Supervision(hang_after, max_memory=max_memory or 0)
    sandbox: str = getattr(arguments, "sandbox", "off") or ("best-effort" if supervise else "off")
    run_as: str | None = getattr(arguments, "run_as", None)
    if sandbox != "off" or run_as is not None:
        from vfiouser_virtio.serving.privileges import other_user  # only here, as the others
        from vfiouser_virtio.serving.sandbox import Sandbox, SandboxMode

        modes: dict[str, SandboxMode | None] = {"best-effort": "best-effort", "off": None}
        user = None if run_as is None else other_user(run_as)
        options["sandbox"] = Sandbox(modes.get(sandbox, "strict"), user=user)
    if supervise or getattr(arguments, "processes", False):
        from vfiouser_virtio.serving.processes import serve_in_processes

        return partial(serve_in_processes, **options, not_for_children=not_for_children)
    from vfiouser_virtio.serving.serve import serve_in_one

    return partial(serve_in_one, **options, abandoned=abandoned)


def audit_of(arguments: argparse.Namespace) -> AbstractContextManager["AuditReport | None"]:
    """The audit that ``--audit`` asks for, with its report at the end of the block. Raises ConfigError."""
    if arguments.audit is None:
        return nullcontext()
    from vfiouser_virtio.cli.audit_report import AuditReport  # only here: it brings all of trio with it

    return AuditReport(arguments.audit)


def _size(text: str) -> int:
    from vfiouser_virtio.serving.options import to_size  # only here: --help does without the devices' options

    try:
        return to_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _uids(text: str) -> list[int]:
    import pwd  # only here: most have no use for it

    uids: list[int] = []
    for word in text.split(","):
        try:
            uid = int(word) if word.isascii() and word.isdecimal() else pwd.getpwnam(word).pw_uid
        except (KeyError, ValueError):  # also of a null byte, or 5000 digits
            raise argparse.ArgumentTypeError(f"there is no user {word!r}") from None
        if uid >= _NO_UID:
            raise argparse.ArgumentTypeError(f"{word} is no user id")
        uids.append(uid)
    return uids


def _line_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines a second; 0 is no limit")
    return rate


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; 0 is never")
    return seconds


def add_log_arguments(parser: argparse.ArgumentParser, *, log_level: str) -> None:
    """``-v`` and ``--log-level``."""
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=log_level,
        help=f"log to stderr from this level on (default: {log_level})",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_const",
        const="debug",
        dest="log_level",
        help="log all there is (the same as --log-level debug): what drivers and clients do with a device, its "
        "features, queues, resets, memory and interrupts; and show tracebacks",
    )
