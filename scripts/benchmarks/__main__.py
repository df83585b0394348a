"""``scripts/bench [NAME…] [--json]``: run benchmarks, print what they measured; status 1 if one missed its limit."""

import argparse
import dataclasses
import json
import logging
import sys

from benchmarks import first_request, stall

BENCHMARKS = {"first-request": first_request, "stall": stall}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *BENCHMARKS], help="which ones (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # what is slow on purpose need not be said
    status = 0
    for name in options.name or BENCHMARKS:
        report = BENCHMARKS[name].run()
        status |= not report.met
        print(json.dumps({"benchmark": name} | dataclasses.asdict(report)) if options.json else f"{name}: {report}")
    return status


if __name__ == "__main__":
    sys.exit(main())
