"""``fuzz``: hostile messages, rings and requests for our own stack, or for any vfio-user server behind its socket."""

import argparse
from pathlib import Path
from typing import Any

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.cli.fuzz_run import DEVICE_KINDS, KINDS, SECONDS, fuzz_device, fuzz_parsers, fuzz_self, fuzz_socket
from vfiouser_virtio.cli.fuzz_server import fuzz_server_processes

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
    _add_parsers(targets)


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
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind only (may be repeated)")
    parser.add_argument("--target", action="append", metavar="DEVICE", help="this device only (may be repeated)")
    _add_corpus(parser)
    _add_common(parser, stop=1)
    parser.set_defaults(execute=fuzz_self)


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
        choices=DEVICE_KINDS,
        action="append",
        help="this kind only (default: rings and requests; of a PCI device of your own: registers and requests)",
    )
    parser.add_argument("device", metavar="DEVICE", help="as after --device of serve, with options of its own")
    _add_corpus(parser)
    _add_common(parser, stop=1)
    parser.set_defaults(execute=fuzz_device)


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
    parser.set_defaults(execute=fuzz_socket)


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


def _add_parsers(targets: SubParsers) -> None:
    parser = add_command(
        targets,
        "parsers",
        under="fuzz",
        summary="this package's parsers alone, ten thousand cases a second",
        description="Rings, messages, requests and registers for the code that reads them, with nothing around it: no\n"
        "event loop, no socket. Each case runs in step with a plain reading of the specification, and both must\n"
        "agree: in what is refused, what is handed out, what is answered, and in every byte of guest memory. What\n"
        "needs more than one party (resets, clients that leave, time) is for the other targets.",
        usage="[--only PARSER …] [--cases N | --seconds S] [--jobs N]",
        examples="  vfiouser-virtio fuzz parsers                                 a minute of all of them\n"
        "  vfiouser-virtio fuzz parsers --only packed --seed 7 --cases 100000\n"
        "  vfiouser-virtio fuzz parsers --seconds 28800 --jobs 2 --report night.json\n"
        "  vfiouser-virtio fuzz parsers --replay packed:7:4711          one case again, by its seed and number\n",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="PARSER",
        help="this parser only (may be repeated): split, packed, messages, blk, config, control",
    )
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="so many processes (default: 1)")
    _add_common(parser, stop=20)
    parser.set_defaults(execute=fuzz_parsers)


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
    parser.add_argument("--seconds", type=_seconds, help=f"how long; default {SECONDS:.0f} without --cases")
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
