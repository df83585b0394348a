"""Command ``scripts/fuzz linux-driver``: drivers of a Linux kernel, fuzzed by devices that lie in several ways."""

import argparse
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import trio

from evil_matrix.cases import SUITES, EvilCase, parse_case
from evil_matrix.classify import Outcome
from evil_matrix.exercises import EXERCISES
from evil_matrix.guest_process import guest_process
from evil_matrix.random_cases import random_case
from evil_matrix.results import CaseResult
from evil_matrix.run_all import run_one
from evil_matrix.table import line
from vfiouser_virtio import vm
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.groups import only

SECONDS = 20.0
Run = Callable[[EvilCase], Awaitable[CaseResult | str]]

_EPILOG = """\
A small Linux gets a device with one to four faults of docs/evil.md, drawn by the seed, and exercises it, as with
scripts/evil-matrix; then the next one, until something is wrong with it, or it has had 16: some 5 s each.

Found is a kernel that crashes (BUG, Oops, KASAN, panic), a QEMU that ends, another device of the guest that does not
work while the kernel is sane; with --warnings a WARNING, too. What is found is confirmed in a guest of its own, and
made smaller: without each of its faults that it does not need.

examples:
  scripts/fuzz linux-driver --cases 20                        # the seed is by the clock, and said
  scripts/fuzz linux-driver --seed 7 --cases 20 --device net  # always the same cases
  scripts/fuzz linux-driver --kernel arch/x86/boot/bzImage --cases 1000 --report found.json
  scripts/fuzz linux-driver --replay 'net net-csum:every=5 interrupt-late:p=0.1:time=50ms'

exit status: 0 when nothing was found, 1 when something was, 2 for a mistake of yours, 130 after Ctrl-C
"""


def what_is_found(result: CaseResult, *, warnings: bool) -> str:
    """What is wrong with a kernel, a QEMU or a server that has come to this; empty where nothing is."""
    first = result.said[0] if result.said else ""
    if result.outcome == Outcome.OOPS.value:
        return f"the kernel crashes: {first}"
    if result.outcome == Outcome.REFUSED.value and first.startswith("QEMU"):
        return first
    if not result.neighbour and result.outcome not in (Outcome.HANG.value, Outcome.REFUSED.value):
        return "another device of the guest does not work any more"
    if warnings and result.warned:
        return f"the kernel warns: {first}"
    return ""


def same(text: str) -> str:
    """What two findings of one fault have in common: no numbers."""
    return re.sub(r"(0x)?[0-9a-f]*\d[0-9a-f]*", "N", text)


async def minimized(case: EvilCase, finding: str, run: Run, *, warnings: bool) -> EvilCase:
    """The case without the faults that the finding does not need."""
    for fault in case.faults:
        fewer = replace(case, faults=tuple(each for each in case.faults if each != fault))
        if not fewer.faults:
            break
        result = await run(fewer)
        if isinstance(result, CaseResult) and same(what_is_found(result, warnings=warnings)) == same(finding):
            case = fewer
    return case


async def fuzz(
    cases: Sequence[EvilCase],
    run: Run,
    alone: Run,
    *,
    warnings: bool,
    until: float,
    tell: Callable[[str], None],
    behind: Callable[[], Sequence[str]] = tuple,
) -> list[dict[str, object]]:
    """Run the cases, or as many as there is time for until ``time.monotonic()`` is ``until``; what was found.

    ``alone`` runs one in a guest of its own; ``behind`` tells which cases the guest of ``run`` has had before the last.
    """
    found: dict[str, dict[str, object]] = {}
    for number, case in enumerate(cases):
        if time.monotonic() > until:
            break
        result = await run(case)
        if isinstance(result, str):
            tell(f"{number:4}  {case.id}: could not be run: {result}")
            continue
        tell(f"{number:4}  {line(result)}")
        finding = what_is_found(result, warnings=warnings)
        if not finding or same(finding) in found:
            continue
        before = list(behind())
        again = await alone(case)
        confirmed = isinstance(again, CaseResult) and same(what_is_found(again, warnings=warnings)) == same(finding)
        least = await minimized(case, finding, alone, warnings=warnings) if confirmed else case
        found[same(finding)] = {
            "finding": finding,
            "case": least.id,
            "of": case.id,
            "confirmed": confirmed,
            "behind": before,
            "result": asdict(result),
        }
        tell(f"FOUND {finding}\n      {'' if confirmed else f'seen once, behind {len(before)} others, by: '}{least.id}")
    return list(found.values())


async def _found(cases: Sequence[EvilCase], options: argparse.Namespace) -> list[dict[str, object]]:
    until = time.monotonic() + options.seconds if options.seconds else float("inf")
    alone = partial(run_one, suite=options.kernel, seconds=SECONDS)
    say = partial(print, flush=True)
    async with guest_process(options.kernel, SECONDS) as guests:
        run = alone if options.replay else guests.run
        return await fuzz(
            cases, run, alone, warnings=options.warnings, until=until, tell=say, behind=lambda: guests.behind
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """See ``_EPILOG``."""
    options = _parser().parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    try:
        devices = tuple(options.device or EXERCISES)
        if options.replay:
            cases = [parse_case(text) for text in options.replay]
        else:
            cases = [random_case(seed, number, devices) for number in range(options.cases)]
        vm.find_qemu()
        vm.guest_image(options.kernel)
        print(f"seed {seed}, kernel {options.kernel}", flush=True)
        found = trio.run(_found, cases, options)
    except (ConfigError, OSError, ValueError) as error:
        print(f"scripts/fuzz linux-driver: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        if only(error, KeyboardInterrupt) is None:
            raise
        return 130
    print(f"{len(found)} found")
    if options.report:
        report = {"seed": seed, "kernel": options.kernel, "findings": found}
        options.report.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return int(bool(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz linux-driver",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, help="which cases (default: by the clock)")
    parser.add_argument("--cases", type=int, default=100, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after so many seconds")
    parser.add_argument("--device", action="append", choices=tuple(EXERCISES), help="this type only (may be repeated)")
    parser.add_argument(
        "--kernel", default=SUITES[-1], metavar="SUITE|FILE", help="a Debian suite, or an image (default: %(default)s)"
    )
    parser.add_argument("--warnings", action="store_true", help="a WARNING of the kernel is a finding as well")
    parser.add_argument("--replay", action="append", metavar="CASE", help="this case instead (may be repeated)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was found, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
