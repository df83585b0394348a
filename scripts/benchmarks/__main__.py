"""``scripts/bench [NAME…]``: measure, and show figures, ratios and verdicts as a table, as JSON, as a picture."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from benchmarks import against, catalogue, picture, report
from benchmarks.measure import ROUNDS, Benchmark, Options
from benchmarks.report import Report
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import VmError

_EPILOG = """\
A ratio is ours / theirs: of throughput more is better, of time less. Every round measures all contenders in turn and
gives one ratio; shown are the medians and, in brackets, the middle half. docs/performance.md explains the figures.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 with --check when a target was missed; 2 when something could not be measured."""
    options = _parser().parse_args(arguments)
    chosen = [catalogue.BENCHMARKS[name] for name in options.name or catalogue.BENCHMARKS]
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name:15} {benchmark.summary}")
        return 0
    logging.basicConfig(level=logging.ERROR)  # what is slow on purpose need not be said
    if (load := os.getloadavg()[0]) > 1:
        busy = f"other programs use this machine (load {load:.1f}): their share falls on all contenders, but not evenly"
        print(f"scripts/bench: {busy}", file=sys.stderr)
    reports = []
    for benchmark in chosen:
        try:
            reports.append(_measure(benchmark, options))
        except (ConfigError, VmError) as error:
            print(f"scripts/bench: {benchmark.name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        if not options.json:
            print(report.as_text(reports[-1]), flush=True)
    if options.json:
        print(json.dumps(report.as_json(reports), indent=1, ensure_ascii=False))
    if options.svg:
        options.svg.write_text(picture.draw(reports))
    missed = [line for one in reports for line in one.missed]
    if options.check and missed:
        print(f"scripts/bench: {len(missed)} targets missed:", *missed, sep="\n  ", file=sys.stderr)
        return 1
    return 0


def _measure(benchmark: Benchmark, options: argparse.Namespace) -> Report:
    notes: list[str] = []
    asked = Options(
        rounds=options.rounds,
        quick=options.quick,
        only=options.only,
        libvfio_user=options.libvfio_user,
        peers=options.peer,
        variants=options.variant,
        progress=report.Progress(benchmark.name),
        note=lambda text: None if text in notes else notes.append(text),
    )
    # stdout is for results alone.
    with redirect_stdout(sys.stderr):
        run = benchmark.run
        if options.against:
            run = partial(against.run, benchmark, options.against, _passed_on(options))
        found = Report(benchmark, run(asked), notes)
        if options.check and found.missed:
            # A machine that is busy for some seconds is no reason to cry; the rounds of both runs count.
            asked.progress(f"again, as {len(found.missed)} targets were missed")
            found = found.and_again(run(asked))
        asked.progress("")
    return found


def _passed_on(options: argparse.Namespace) -> list[str]:
    """What both sides of `--against` are told."""
    words = ["--quick"] * options.quick
    if options.only:
        words.append(f"--only={options.only}")
    if options.libvfio_user:
        words.append(f"--libvfio-user={options.libvfio_user}")
    return [
        *words,
        *(f"--peer={peer}" for peer in options.peer),
        *(f"--variant={variant}" for variant in options.variant),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "name",
        nargs="*",
        choices=[[], *catalogue.BENCHMARKS],
        metavar="NAME",
        help=f"which ones: {', '.join(catalogue.BENCHMARKS)} (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="say what each measures, and do not measure")
    parser.add_argument("--json", action="store_true", help="print JSON, with the figures of every round")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios and their targets into a picture")
    parser.add_argument("--check", action="store_true", help="exit with status 1 and a list when a target is missed")
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="measure this working tree and that revision of Git in turn; a ratio is that of our two figures, "
        "and a target is missed by what is slower by more than 3%%",
    )
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a short run, with fewer and shorter measurements")
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="requests, guest-io, net, engines, isolation: only metrics with such a name",
    )
    parser.add_argument(
        "--libvfio-user",
        type=Path,
        metavar="DIR",
        help="registers, engines: a build of libvfio-user (with -O2; Meson's default is not optimised) to compare with",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="DEVICE",
        help="guest-io: one more disk beside ours, as an argument of QEMU's -device; may be repeated",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="guest-io: one more disk of ours, with these options; may be repeated",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    # What it has started ends, and its files go, when it is told to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
