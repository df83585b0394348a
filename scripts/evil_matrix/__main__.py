"""Command ``scripts/evil-matrix``: what Linux makes of each fault of docs/evil.md, in a guest for each."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import trio

from evil_matrix import results, table
from evil_matrix.cases import CASES, SUITES, EvilCase
from evil_matrix.classify import Outcome
from evil_matrix.run_all import run_all
from vfiouser_virtio import vm
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.groups import only

SECONDS = 20.0

_OUTCOMES = "\n".join(f"  {outcome.value:9} {outcome.means}" for outcome in Outcome)
_EPILOG = f"""\
Each case boots a small Linux with an honest device (rng or blk), plugs the device with the fault in, and has the guest
exercise it: data are read and written with checksums, the driver is unbound and bound again, and that once more.

outcomes, the worst that has happened:
{_OUTCOMES}
"warn" is said beside them: the kernel has said WARNING. A hang is one after {SECONDS:g} s of the guest's clock
(--seconds); an honest device takes 2 to 4. Whether the honest device still works is said, too.

examples:
  scripts/evil-matrix                                # all cases without a result, on both kernels: 15 s each
  scripts/evil-matrix --list                         # the cases, and what is known of them
  scripts/evil-matrix --only used-twice              # the cases of one fault; --only net: of one device type
  scripts/evil-matrix --only used-twice --again -v   # run them once more, and show what the guest has said
  scripts/evil-matrix --kernel trixie-backports --jobs 2 --most 20
  scripts/evil-matrix --kernel arch/x86/boot/bzImage --results mine.jsonl    # a kernel of yours, with its modules
  scripts/evil-matrix --kernel arch/x86/boot/bzImage --results mine.jsonl --table
  scripts/evil-matrix --write                        # put the table into docs/evil.md

Results are lines of scripts/evil_matrix/results.jsonl, one for each case: what was interrupted goes on where it was.
exit status: 0; 1 when a case could not be run, or a fault did not happen; 2 for a mistake of yours; 130 after Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """See ``_EPILOG``."""
    options = _parser().parse_args(arguments)
    try:
        return _do(options)
    except (ConfigError, OSError, ValueError, TypeError) as error:
        print(f"scripts/evil-matrix: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        if only(error, KeyboardInterrupt) is None:
            raise
        print("scripts/evil-matrix: what is done is kept; the same command goes on with the rest", file=sys.stderr)
        return 130


def _do(options: argparse.Namespace) -> int:
    suites = options.kernel or list(SUITES)
    chosen = [case for case in CASES if not options.only or any(_is_meant(word, case) for word in options.only)]
    for word in options.only:
        if not any(_is_meant(word, case) for case in CASES):
            raise ConfigError(f"--only {word}: there is no such case; --list shows all")
    if options.write:
        results.tidy([(case.id, suite) for suite in SUITES for case in CASES], options.results)
        table.write(results.read(options.results))
        return 0
    known = results.read(options.results)
    if options.list:
        print(table.listing(known, chosen, suites))
    elif options.table:
        print(table.markdown(known, chosen, suites))
    elif options.json:
        found = [known[case.id, suite] for case in chosen for suite in suites if (case.id, suite) in known]
        print(json.dumps([asdict(result) for result in found], indent=1, ensure_ascii=False))
    else:
        todo = [(case, suite) for suite in suites for case in chosen]
        todo = [(case, suite) for case, suite in todo if options.again or (case.id, suite) not in known]
        vm.find_qemu()
        for suite in suites:  # fetched once, and not by each case
            vm.guest_image(suite)
        work = partial(
            run_all,
            todo[: options.most],
            jobs=options.jobs,
            seconds=options.seconds,
            path=options.results,
            verbose=options.verbose,
        )
        return trio.run(work)
    return 0


def _is_meant(word: str, case: EvilCase) -> bool:
    return word in (case.device, case.fault, case.id)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/evil-matrix",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FAULT",
        help="the cases of this fault, of this device type, or this case as --list shows it; may be repeated",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="SUITE|FILE",
        help=f"a Debian suite, or an image; may be repeated (default: {' and '.join(SUITES)})",
    )
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="guests at a time (default: 1)")
    parser.add_argument("--most", type=_positive, metavar="N", help="end after so many cases")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="what an exercise may take before it hangs, by the guest's clock (default: %(default)g)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FILE,
        metavar="FILE",
        help="where results are kept (default: scripts/evil_matrix/results.jsonl)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what each guest has said")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--list", action="store_true", help="show the cases and what is known of them, and run none")
    show.add_argument("--table", action="store_true", help="print the results as a table of Markdown")
    show.add_argument("--json", action="store_true", help="print the results as JSON")
    show.add_argument("--write", action="store_true", help="put the table into docs/evil.md, and drop old results")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    # What it has started ends when it is told to end, too.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
