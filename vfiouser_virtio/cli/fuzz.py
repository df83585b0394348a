"""``fuzz``: hostile messages, rings and requests for our own stack, or for any vfio-user server behind its socket."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.cli.exit_status import ExitStatus, NoServerError
from vfiouser_virtio.cli.fuzz_server import fuzz_server_processes
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.terminal import note, say

if TYPE_CHECKING:
    from vfiouser_virtio.testing.fuzz import Case, Finding
    from vfiouser_virtio.testing.fuzz.case import Kind
    from vfiouser_virtio.testing.fuzz.jobs import Work
    from vfiouser_virtio.testing.fuzz.report import Discovery, FuzzReport

_SECONDS = 60.0
_KINDS: "tuple[Kind, ...]" = ("messages", "registers", "rings", "requests")
_DEVICE_KINDS: "tuple[Kind, ...]" = ("registers", "rings", "requests")
_MOST_JOBS = 256


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command, and those of its targets."""
    parser = add_command(
        commands,
        "fuzz",
        summary="throw hostile messages, rings and requests at a server or a device",
        description="Make hostile cases from a seed, run them, and say what breaks. What is found is made as small as\n"
        "possible and written to a file, which --replay runs again (docs/fuzzing.md).",
        usage="TARGET …",
        examples="  vfiouser-virtio fuzz self --seconds 60\n"
        "  vfiouser-virtio fuzz socket /run/x/my.sock --restart 'my-server {socket}'\n",
    )
    # Any: what this is has no public name.
    targets: Any = parser.add_subparsers(dest="fuzzed", required=True, metavar="TARGET", title="targets")
    _add_self(targets)
    _add_device(targets)
    _add_socket(targets)
    _add_server(targets)


def _add_self(targets: SubParsers) -> None:
    parser = add_command(
        targets,
        "self",
        under="fuzz",
        summary="this package's own stack, in this process",
        description="Messages, register accesses, rings and requests for our own server and devices, in this process.",
        usage="[--only KIND …] [--target DEVICE …] [--cases N | --seconds S]",
        examples="  vfiouser-virtio fuzz self                                    a minute of everything\n"
        "  vfiouser-virtio fuzz self --seed 7 --cases 500 --only rings  always the same 500 cases\n"
        "  vfiouser-virtio fuzz self --replay tests/fuzz/corpus/x.json  one case again\n",
    )
    parser.add_argument("--only", choices=_KINDS, action="append", help="this kind only (may be repeated)")
    parser.add_argument("--target", action="append", metavar="DEVICE", help="this device only (may be repeated)")
    _add_corpus(parser)
    _add_common(parser, stop=1)
    parser.set_defaults(execute=_self)


def _add_device(targets: SubParsers) -> None:
    parser = add_command(
        targets,
        "device",
        under="fuzz",
        summary="the queues or registers of any device, or of your own, in this process",
        description="Rings and requests for one device, which is made for each case: of its type's format where\n"
        "that is declared, else bytes; for a PCI device of your own (PciDevice) what its registers make of memory,\n"
        "and accesses of any width. Requests do what they say: give it files that may be lost.",
        usage="[--only KIND …] [--cases N | --seconds S] DEVICE[,KEY=VALUE,…]",
        examples="  vfiouser-virtio fuzz device blk,size=1M\n"
        "  vfiouser-virtio fuzz device my_device.py:MyDevice --seed 7 --cases 500\n"
        "  vfiouser-virtio fuzz my_chip.py:MyChip                        the same, shorter\n"
        "  vfiouser-virtio fuzz device my_device.py:MyDevice --replay fuzz-findings/bug-x.json\n",
    )
    parser.add_argument(
        "--only",
        choices=_DEVICE_KINDS,
        action="append",
        help="this kind only (default: rings and requests; of a PCI device of your own: registers and requests)",
    )
    parser.add_argument("device", metavar="DEVICE", help="as after --device of serve, with options of its own")
    _add_corpus(parser)
    _add_common(parser, stop=1)
    parser.set_defaults(execute=_device)


def _add_socket(targets: SubParsers) -> None:
    parser = add_command(
        targets,
        "socket",
        under="fuzz",
        summary="any vfio-user server, through its socket",
        description="Conversations with any vfio-user server, as QEMU's but for what is wrong in them: sizes, fields,\n"
        "file descriptors, half messages, clients that leave. Found is: the server dies, its sanitizer\n"
        "complains, it does not answer, answers wrongly, keeps file descriptors, or fails a good client afterwards.",
        usage="[--restart COMMAND] [--cases N | --seconds S] PATH",
        examples="  vfiouser-virtio fuzz socket --restart 'samples/server {socket}' /tmp/x.sock\n"
        "  vfiouser-virtio fuzz socket --restart 'samples/server {socket}' --jobs 2 --seconds 3600 /tmp/x.sock\n"
        "  vfiouser-virtio fuzz socket --restart 'samples/server {socket}' --replay crash.json /tmp/x.sock\n",
    )
    parser.add_argument(
        "--restart",
        metavar="COMMAND",
        help="what starts the server, and again when it has died; {socket} in it is replaced by PATH. Without it the "
        "server must be there, and the first crash is the end",
    )
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="so many servers at a time (default: 1)")
    parser.add_argument(
        "--wait", type=_seconds, metavar="SECONDS", help="how long a reply may take (default: 5, which is QEMU's limit)"
    )
    parser.add_argument("--exit-ok", action="store_true", help="a server that ends by itself is no finding")
    parser.add_argument("path", type=Path, metavar="PATH", help="where the server listens")
    _add_common(parser, stop=20)
    parser.set_defaults(execute=_socket)


def _add_server(targets: SubParsers) -> None:
    parser = add_command(
        targets,
        "server",
        under="fuzz",
        summary="this package's server processes: what an attack costs their neighbours",
        description="Attacks on `serve` with several devices, by clients in processes of their own. Found is: the\n"
        "register of a neighbour is late, memory of another client is written, something of the attack is left, the\n"
        "log is flooded, a device that was not attacked takes no client, the server dies or does not end.",
        usage="[--only FAMILY …] [--cases N | --seconds S]",
        examples="  vfiouser-virtio fuzz server --seconds 600\n"
        "  vfiouser-virtio fuzz server --seed 7 --cases 5 --only chains\n"
        "  vfiouser-virtio fuzz server --tree ../older                   the server is another checkout's\n",
    )
    parser.add_argument("--only", action="append", metavar="FAMILY", help="this family only (may be repeated)")
    parser.add_argument("--tree", type=Path, metavar="FOLDER", help="attack the server of the package in this folder")
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="what an attack may cost (may be repeated): stall (seconds a neighbour's register may take, 0.2); memory, "
        "peak (bytes of the server's own more afterwards, 48 MiB, and at any time, 192 MiB); fds, mappings "
        "(more afterwards, 24 and 200); log, log_rate (bytes at once, 128 KiB, and then a second, 32 KiB)",
    )
    _add_common(parser, stop=1)
    parser.set_defaults(execute=fuzz_server_processes)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FOLDER",
        help="let coverage guide: run the cases in this folder first, make others from them, and add those that run "
        "new lines (Python 3.12 and later)",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="make no new cases: leave in the folder of --corpus the smallest ones that together run the same lines, "
        "of its own and of these folders",
    )


def _add_common(parser: argparse.ArgumentParser, *, stop: int) -> None:
    parser.add_argument("--seed", type=int, help="which cases; default: by the clock")
    parser.add_argument("--cases", type=_count, metavar="N", help="how many (of each kind)")
    parser.add_argument("--seconds", type=_seconds, help=f"how long; default {_SECONDS:.0f} without --cases")
    parser.add_argument(
        "--stop", type=_count, default=stop, metavar="N", help=f"end after N different findings (default: {stop})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fuzz-findings"),
        metavar="FOLDER",
        help="for findings (default: fuzz-findings)",
    )
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run these cases, and no others")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report as JSON, too")
    add_log_arguments(parser, log_level="error")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _jobs(text: str) -> int:
    if (jobs := _count(text)) > _MOST_JOBS:
        raise argparse.ArgumentTypeError(f"{text} are more than {_MOST_JOBS}")
    return jobs


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


# ---- running -----------------------------------------------------------------------------------------------------


def _self(arguments: argparse.Namespace) -> int:
    from vfiouser_virtio.testing.fuzz import run_case
    from vfiouser_virtio.testing.fuzz.run import ALL_TARGETS, StackRun, fuzz_stack, kinds_for

    for target in arguments.target or ():
        if target not in ALL_TARGETS:
            raise ConfigError(f"--target: there is no {target!r}; there are {', '.join(ALL_TARGETS)}")
    if arguments.replay:
        return _replay(arguments.replay, run_case)
    targets = tuple(arguments.target or ALL_TARGETS)
    kinds = kinds_for(targets, arguments.only or _KINDS)
    if not kinds:
        raise ConfigError(f"--only {arguments.only[0]}: {', '.join(targets)} has none: expected registers or requests")
    run = StackRun(
        seed=_seed(arguments),
        kinds=kinds,
        targets=targets,
        out=arguments.out,
        corpus=arguments.corpus,
        merge=_merged(arguments),
    )
    return _fuzz(arguments, "self", run.seed, fuzz_stack, run)


def _device(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from vfiouser_virtio.testing.fuzz import run_case
    from vfiouser_virtio.testing.fuzz.described import add_described
    from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS
    from vfiouser_virtio.testing.fuzz.run import StackRun, fuzz_stack, kinds_for

    target = add_described(arguments.device)
    if arguments.replay:
        return _replay(arguments.replay, lambda case: run_case(replace(case, target=target)))
    kinds = kinds_for([target], arguments.only or (_DEVICE_KINDS if target in PCI_TARGETS else ("rings", "requests")))
    if not kinds:
        raise ConfigError(f"--only rings: {target} is no virtio device: expected registers or requests")
    run = StackRun(
        seed=_seed(arguments),
        kinds=kinds,
        targets=(target,),
        out=arguments.out,
        corpus=arguments.corpus,
        merge=_merged(arguments),
        source=target.partition(":")[0],
    )
    return _fuzz(arguments, target, run.seed, fuzz_stack, run)


def _merged(arguments: argparse.Namespace) -> list[Path] | None:
    """The folders of --merge. Raises ConfigError."""
    folders: list[Path] | None = arguments.merge
    if folders is None:
        return None
    if arguments.corpus is None:
        raise ConfigError("--merge: into which folder? Name it with --corpus")
    for folder in (arguments.corpus, *folders):
        if not folder.is_dir():
            raise ConfigError(f"--merge: {folder} is no folder")
    return folders


def _socket(arguments: argparse.Namespace) -> int:
    from vfiouser_virtio.testing.fuzz.servers import (
        WAIT,
        ServerGoneError,
        ServerRun,
        check_jobs,
        fuzz_server,
        replay_on_server,
    )

    run = ServerRun(
        arguments.path,
        _seed(arguments),
        restart=arguments.restart,
        out=arguments.out,
        wait=arguments.wait or WAIT,
        exit_ok=arguments.exit_ok,
    )
    check_jobs(run, arguments.jobs)
    try:
        if arguments.replay:
            return _replay(arguments.replay, lambda case: replay_on_server(run, case))
        return _fuzz(arguments, str(arguments.path), run.seed, fuzz_server, run)
    except ServerGoneError as error:
        raise NoServerError(str(error)) from None


def _seed(arguments: argparse.Namespace) -> int:
    return int(time.time()) if arguments.seed is None else int(arguments.seed)


def _replay(paths: list[Path], run: "Callable[[Case], Finding | None]") -> int:
    from vfiouser_virtio.testing.fuzz.save import load

    found = 0
    for path in paths:
        case = load(path)
        try:
            finding = run(case)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: no case for this target: {error}") from error
        say(f"{path}: {finding or 'nothing found'}")
        found += finding is not None
    return ExitStatus.FAILED if found else ExitStatus.OK


def _fuzz(arguments: argparse.Namespace, target: str, seed: int, work: "Work", options: object) -> int:
    from vfiouser_virtio.testing.fuzz.jobs import run_jobs
    from vfiouser_virtio.testing.fuzz.report import FuzzReport

    limited = (
        arguments.seconds is not None or arguments.cases is not None or getattr(arguments, "merge", None) is not None
    )
    seconds = arguments.seconds if limited else _SECONDS
    report = FuzzReport(target, seed)
    note(f"seed {seed}")
    try:
        run_jobs(
            work,
            options,
            report,
            cases=arguments.cases,
            seconds=seconds,
            jobs=getattr(arguments, "jobs", 1),
            stop=arguments.stop,
            on_found=_show,
        )
    except KeyboardInterrupt:
        _end(arguments, report)
        raise
    return _end(arguments, report)


def _show(discovery: "Discovery") -> None:
    say(f"{discovery.origin}: {discovery.finding}\n-> {discovery.path}")


def _end(arguments: argparse.Namespace, report: "FuzzReport") -> int:
    say(report.text())
    if arguments.report is not None:
        report.write(arguments.report)
    return ExitStatus.FAILED if report.discoveries else ExitStatus.OK
