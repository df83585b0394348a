"""``fuzz server``: attacks on server processes, and what they cost their neighbours."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.exit_status import ExitStatus
from vfiouser_virtio.cli.fuzz_run import replay_command
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.terminal import note, say

if TYPE_CHECKING:
    from vfiouser_virtio.testing.fuzz.process import ProcessCase, ProcessFinding, ServerBudgets

_SECONDS = 60.0


def fuzz_server_processes(arguments: argparse.Namespace) -> int:
    """Run the sub-command: `ExitStatus.FAILED` if something is found, and it is in a file.

    Raises `ConfigError` for a folder without the package, a family or budget that there is not, and a file that is no
    case.
    """
    from vfiouser_virtio.testing.fuzz.oracle import Finding
    from vfiouser_virtio.testing.fuzz.process import ANY, FAMILIES, ServerBudgets, fuzz_processes
    from vfiouser_virtio.testing.fuzz.process.server import TREE
    from vfiouser_virtio.testing.fuzz.report import ONCE, Discovery, FuzzReport

    tree = TREE if arguments.tree is None else arguments.tree.resolve()
    if not (tree / "vfiouser_virtio").is_dir():
        raise ConfigError(f"--tree: there is no package vfiouser_virtio in {tree}")
    for family in arguments.only or ():
        if family not in FAMILIES:
            raise ConfigError(f"--only: there is no family {family!r}; there are {', '.join(FAMILIES)}")
    try:
        budgets = ServerBudgets.parse(arguments.budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    if arguments.replay:
        return _replay(arguments.replay, tree, budgets)
    seed = int(time.time()) if arguments.seed is None else int(arguments.seed)
    note(f"seed {seed}")
    report = FuzzReport("server", seed)
    files: dict[str, Path] = {}
    again = ["server", *(["--tree", str(tree)] if arguments.tree else ())]
    again += [word for budget in arguments.budget for word in ("--budget", budget)]

    def keep(case: "ProcessCase", findings: "list[ProcessFinding]") -> None:
        case.shows = str(findings[0]).splitlines()[0][:200]
        files[case.origin] = path = arguments.out / f"server-{case.origin.replace(':', '-')}.json"
        arguments.out.mkdir(parents=True, exist_ok=True)
        path.write_text(case.dumps())

    run = fuzz_processes(
        seed,
        families=arguments.only or (ANY,),
        cases=arguments.cases,
        seconds=_SECONDS if arguments.seconds is None and arguments.cases is None else arguments.seconds,
        tree=tree,
        stop=arguments.stop,
        tell=note,
        keep=keep,
        budgets=budgets,
    )
    report.ended, report.cases = time.monotonic(), run.cases
    if run.left_out:
        report.notes["cases left out, for what this machine has not"] = run.left_out
    if run.once:
        report.notes[ONCE] = run.once
    for case, findings in run.found:
        path = files[case.origin]
        say(f"{path}: " + "\n".join(map(str, findings)) + f"\n-> {replay_command(again, path)}")
        steps = sum(map(len, case.lanes)) + len(case.host)
        for each in findings:
            report.add(Discovery(case.origin, steps, Finding(each.kind, each.what, case.family), str(path)))
    say(f"server: {run.cases} cases, {len(run.found)} with findings, seed {seed}")
    if arguments.report is not None:
        report.write(arguments.report)
    return ExitStatus.FAILED if run.found else ExitStatus.OK


def _replay(paths: list[Path], tree: Path, budgets: "ServerBudgets") -> int:
    from vfiouser_virtio.testing.fuzz.process import replay_process_case

    failed = False
    for path in paths:
        findings = replay_process_case(_load(path), tree=tree, budgets=budgets)
        say(f"{path}: " + ("\n".join(map(str, findings)) or "nothing found"))
        failed |= bool(findings)
    return ExitStatus.FAILED if failed else ExitStatus.OK


def _load(path: Path) -> "ProcessCase":
    from vfiouser_virtio.testing.fuzz.process import ProcessCase

    try:
        return ProcessCase.load(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: no case for this target: {error}") from error
