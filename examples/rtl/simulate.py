"""Icarus Verilog with copier.v in it, for a bridge: ``python3 simulate.py SOCKET [--waves]``.

With ``--waves`` all signals are recorded, in ``sim_build/copier.fst``, for GTKWave or Surfer.
"""

import argparse
import sys
from pathlib import Path

from cocotb_tools.check_results import get_results
from cocotb_tools.runner import get_runner

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Build, and simulate until the bridge ends. Exit status 1 when the simulation has failed."""
    parser = argparse.ArgumentParser(description="Simulate copier.v for a bridge.")
    parser.add_argument("socket", help="UNIX socket of the bridge (its option simulator=)")
    parser.add_argument("--waves", action="store_true", help="record all signals")
    parser.add_argument("--build-dir", default="sim_build", help="folder for what is built (default: sim_build)")
    options = parser.parse_args()
    runner = get_runner("icarus")
    runner.build(
        sources=[HERE / "copier.v"],
        hdl_toplevel="copier",
        build_dir=options.build_dir,
        waves=options.waves,
        always=True,
    )
    results = runner.test(
        test_module="copier_simulation",
        hdl_toplevel="copier",
        build_dir=options.build_dir,
        waves=options.waves,
        extra_env={"BRIDGE": str(Path(options.socket).resolve()), "PYTHONPATH": str(HERE)},
    )
    _tests, failed = get_results(results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
