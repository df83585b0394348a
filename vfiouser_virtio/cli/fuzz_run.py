"""Runs of ``fuzz self``, ``device``, ``socket`` and ``parsers``, and what they say."""

import argparse
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.exit_status import ExitStatus, NoServerError
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.terminal import note, say

if TYPE_CHECKING:
    from vfiouser_virtio.testing.fuzz import Case, Finding
    from vfiouser_virtio.testing.fuzz.case import Kind
    from vfiouser_virtio.testing.fuzz.jobs import Work
    from vfiouser_virtio.testing.fuzz.report import Discovery, FuzzReport

SECONDS = 60.0
"""How long a run is that has no limit."""
KINDS: "tuple[Kind, ...]" = ("messages", "registers", "rings", "requests")
DEVICE_KINDS: "tuple[Kind, ...]" = ("registers", "rings", "requests")
_REPLAYS = 3
"""So often a case is run, at most, until it shows what it was kept for, which may be a race."""


def replay_command(words: Sequence[str], path: Path | str) -> str:
    """The command that replays a file; ``words`` are those behind ``fuzz``."""
    return shlex.join(["vfiouser-virtio", "fuzz", *words, "--replay", str(path)])


def fuzz_self(arguments: argparse.Namespace) -> int:
    """Run ``fuzz self``: `ExitStatus.FAILED` if something is found, and it is in a file. Raises ConfigError."""
    from vfiouser_virtio.testing.fuzz import run_case
    from vfiouser_virtio.testing.fuzz.run import ALL_TARGETS, StackRun, fuzz_stack, kinds_for

    for target in arguments.target or ():
        if target not in ALL_TARGETS:
            raise ConfigError(f"--target: there is no {target!r}; there are {', '.join(ALL_TARGETS)}")
    if arguments.replay:
        return _replay(arguments.replay, run_case)
    targets = tuple(arguments.target or ALL_TARGETS)
    kinds = kinds_for(targets, arguments.only or KINDS)
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
    return _fuzz(arguments, "self", run.seed, fuzz_stack, run, again=["self"])


def fuzz_device(arguments: argparse.Namespace) -> int:
    """Likewise ``fuzz device``."""
    from dataclasses import replace

    from vfiouser_virtio.testing.fuzz import run_case
    from vfiouser_virtio.testing.fuzz.described import add_described
    from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS
    from vfiouser_virtio.testing.fuzz.run import StackRun, fuzz_stack, kinds_for

    target = add_described(arguments.device)
    if arguments.replay:
        return _replay(arguments.replay, lambda case: run_case(replace(case, target=target)))
    kinds = kinds_for([target], arguments.only or (DEVICE_KINDS if target in PCI_TARGETS else ("rings", "requests")))
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
    return _fuzz(arguments, target, run.seed, fuzz_stack, run, again=["device", arguments.device])


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


def fuzz_socket(arguments: argparse.Namespace) -> int:
    """Likewise ``fuzz socket``. Raises NoServerError, too."""
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
        return _fuzz(arguments, str(arguments.path), run.seed, fuzz_server, run, again=_same_server(arguments))
    except ServerGoneError as error:
        raise NoServerError(str(error)) from None


def fuzz_parsers(arguments: argparse.Namespace) -> int:
    """Likewise ``fuzz parsers``."""
    from vfiouser_virtio.testing.fuzz.parsers.run import (
        PARSERS,
        ParserRun,
        fuzz_parsers,
        parser_case,
        run_parser_case,
    )

    for name in arguments.only or ():
        if name not in PARSERS:
            raise ConfigError(f"--only: there is no parser {name!r}; there are {', '.join(PARSERS)}")
    if arguments.replay:
        return _replay(arguments.replay, run_parser_case, parser_case)
    run = ParserRun(_seed(arguments), tuple(arguments.only or PARSERS), arguments.out)
    return _fuzz(arguments, "parsers", run.seed, fuzz_parsers, run, again=["parsers"])


def _same_server(arguments: argparse.Namespace) -> list[str]:
    words = ["socket", *(["--restart", arguments.restart] if arguments.restart else ())]
    words += [f"--wait={arguments.wait:g}"] if arguments.wait else []
    return [*words, *(["--exit-ok"] if arguments.exit_ok else ()), str(arguments.path)]


def _seed(arguments: argparse.Namespace) -> int:
    return int(time.time()) if arguments.seed is None else int(arguments.seed)


def _replay(
    paths: list[Path],
    run: "Callable[[Case], Finding | None]",
    by_name: "Callable[[str], Case | None]" = lambda _: None,
) -> int:
    """``by_name`` makes a case of what is no file."""
    from vfiouser_virtio.testing.fuzz.save import load

    found = 0
    for path in paths:
        case = by_name(str(path)) or load(path)
        finding = None
        try:
            for _ in range(_REPLAYS):
                if (finding := run(case)) is not None:
                    break
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: no case for this target: {error}") from error
        say(f"{path}: {finding or 'nothing found'}")
        found += finding is not None
    return ExitStatus.FAILED if found else ExitStatus.OK


def _fuzz(
    arguments: argparse.Namespace, target: str, seed: int, work: "Work", options: object, *, again: Sequence[str]
) -> int:
    """``again``: words of the command, behind ``fuzz``, that replays a case of the same target."""
    from vfiouser_virtio.testing.fuzz.jobs import run_jobs
    from vfiouser_virtio.testing.fuzz.report import FuzzReport

    limited = (
        arguments.seconds is not None or arguments.cases is not None or getattr(arguments, "merge", None) is not None
    )
    seconds = arguments.seconds if limited else SECONDS

    def show(discovery: "Discovery") -> None:
        say(f"{discovery.origin}: {discovery.finding}\n-> {replay_command(again, discovery.path)}")

    report = FuzzReport(target, seed)
    note(f"seed {seed}")
    before = signal.signal(signal.SIGTERM, _interrupt)  # what was run until then is not lost
    try:
        run_jobs(
            work,
            options,
            report,
            cases=arguments.cases,
            seconds=seconds,
            jobs=getattr(arguments, "jobs", 1),
            stop=arguments.stop,
            on_found=show,
        )
    except KeyboardInterrupt:
        _end(arguments, report)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return _end(arguments, report)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end(arguments: argparse.Namespace, report: "FuzzReport") -> int:
    say(report.text())
    if arguments.report is not None:
        report.write(arguments.report)
    return ExitStatus.FAILED if report.discoveries else ExitStatus.OK
