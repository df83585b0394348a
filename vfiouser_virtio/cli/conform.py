"""``conform``: check any vfio-user virtio server against the specifications."""

import argparse
import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.cli.exit_status import ExitStatus
from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.output_file import write_report
from vfiouser_virtio.serving.terminal import say

if TYPE_CHECKING:
    from vfiouser_virtio.testing.conformance import Check, Exercise, Result, Wire


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "conform",
        summary="check a server against the virtio and vfio-user specifications",
        description="Connect to any vfio-user server that has a virtio device, as its client and as a guest, and\n"
        "check what it does against the rules of virtio 1.4 and of vfio-user. The device is used and reset: a disk\n"
        "is read, a console gets a line of text. docs/conformance.md lists the checks. The exit status is 0 when\n"
        "every check passes or does not apply, and 1 otherwise.",
        usage="[--only ID …] [--json] [--junit FILE] [--peer SOCKET] SOCKET",
        examples="  vfiouser-virtio conform /run/x/blk0.sock\n"
        "  vfiouser-virtio conform --only virtio14/RS1 --only 'vfio-user/*' /run/x/blk0.sock\n"
        "  vfiouser-virtio conform --junit report.xml /run/x/blk0.sock\n"
        "  vfiouser-virtio conform --peer /run/x/net1.sock /run/x/net0.sock\n"
        "  vfiouser-virtio conform --list\n",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="ID", help="only this check, or those that match: 'virtio14/UR*'"
    )
    parser.add_argument("--list", action="store_true", help="show the checks, and run none")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML, too, as CI systems read it")
    parser.add_argument(
        "--timeout", type=float, default=2.0, metavar="SECONDS", help="how long a reply may take (default: 2)"
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="how long to watch for what must not happen (default: 0.05)",
    )
    parser.add_argument(
        "--exercise",
        metavar="FILE.py:NAME",
        help="a request for a device of a type that the checks do not know: an Exercise of yours in a Python file",
    )
    parser.add_argument(
        "--peer",
        metavar="SOCKET",
        help="where a second network device is served, on the network of the one to be checked, such as a port of the "
        "same hub: checks of what is received, and of what is sent, send and receive there",
    )
    parser.add_argument("socket", nargs="?", metavar="SOCKET", help="where the server listens")
    add_log_arguments(parser, log_level="error")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the checks. Raises NoServerError when there is no server to check, ConfigError when a check is not known."""
    import trio

    from vfiouser_virtio.testing.conformance import GOOD, Wire, as_json, as_junit, list_json, list_text, summary
    from vfiouser_virtio.vfio_user import RemoteError

    checks = _chosen(arguments.only)
    if arguments.list:
        say(list_json(checks) if arguments.json else list_text(checks))
        return ExitStatus.OK
    if arguments.socket is None:
        raise ConfigError("conform: which SOCKET? (or --list)")
    if arguments.peer is not None and Path(arguments.peer).resolve() == Path(arguments.socket).resolve():
        raise ConfigError("conform: --peer is another device than the one to be checked, on the same network")
    wire = Wire(
        arguments.socket,
        timeout=arguments.timeout,
        settle=arguments.settle,
        exercise=_exercise(arguments.exercise),
        peer=arguments.peer,
    )
    try:
        results = trio.run(_run, wire, checks, not arguments.json)
    except (PeerError, RemoteError) as error:
        raise ConfigError(f"{arguments.socket}: {str(error).removeprefix(f'{arguments.socket}: ')}") from error
    say(as_json(arguments.socket, results) if arguments.json else summary(results))
    if arguments.junit is not None:
        try:
            write_report(arguments.junit, as_junit(arguments.socket, results))
        except OSError as error:
            raise ConfigError(f"--junit: cannot write {arguments.junit}: {error.strerror}") from None
    return ExitStatus.OK if all(result.verdict in GOOD for result in results) else ExitStatus.FAILED


async def _run(wire: "Wire", checks: "list[Check]", shown: bool) -> "list[Result]":
    from vfiouser_virtio.cli.no_server import explain, has_client
    from vfiouser_virtio.testing.conformance import NO_VIRTIO, run_checks, text_line
    from vfiouser_virtio.vfio_user import ConnectError, RemoteError

    results: list[Result] = []
    without_virtio = False
    if wire.peer is not None:
        busy = has_client(str(wire.peer))
        try:
            async with wire.at_peer().connect():
                pass
        except (ConnectError, PeerError, RemoteError) as error:
            raise await explain(str(wire.peer), error, busy=busy) from None
    busy = has_client(str(wire.path))
    try:
        async for result in run_checks(wire, checks):
            results.append(result)
            told = without_virtio and result.detail.startswith(NO_VIRTIO)
            without_virtio |= result.detail.startswith(NO_VIRTIO)
            if shown and not told:  # one line for all checks of virtio where there is none
                say(text_line(result))
    except (ConnectError, PeerError, RemoteError) as error:
        if results:
            raise
        raise await explain(str(wire.path), error, busy=busy) from None
    return results


def _exercise(wanted: str | None) -> "Exercise | None":
    """What ``FILE.py:NAME`` is: an `Exercise`, or a function that makes one. Raises ConfigError for anything else."""
    from vfiouser_virtio.serving.device_files import import_file
    from vfiouser_virtio.testing.conformance import Exercise

    if wanted is None:
        return None
    path, _, name = wanted.rpartition(":")
    if not path or not name:
        raise ConfigError(f"--exercise {wanted}: expected FILE.py:NAME")
    found: object = getattr(import_file(Path(path), "exercise file"), name, None)
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"--exercise {wanted}: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Exercise):
        raise ConfigError(f"--exercise {wanted}: {name} is no vfiouser_virtio.testing.conformance.Exercise")
    return found


def _chosen(patterns: list[str]) -> "list[Check]":
    from vfiouser_virtio.testing.conformance import CHECKS

    if not patterns:
        return list(CHECKS.values())
    for pattern in patterns:
        if not any(fnmatchcase(check_id, pattern) for check_id in CHECKS):
            near = difflib.get_close_matches(pattern, CHECKS, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; --list shows them all"
            raise ConfigError(f"--only: there is no check {pattern!r}{hint}")
    return [check for check_id, check in CHECKS.items() if any(fnmatchcase(check_id, pattern) for pattern in patterns)]
