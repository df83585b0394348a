"""Fuzzing jobs: one in this process, or several, each in a process of its own, which share the cases of one seed."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.progress import ProgressLine
from vfiouser_virtio.testing.fuzz.report import Discovery, FuzzReport

_TELL_EVERY = 0.1  # seconds
_LOOK_EVERY = 0.5
_END_TIMEOUT = 30.0


class _Flag(Protocol):
    def is_set(self) -> bool: ...


@dataclass(slots=True)
class Share:
    """Part of a run that one job does: which cases, until when, and where it tells what it did."""

    tell: Callable[[str, object], None]
    enough: _Flag
    cases: int | None = None
    """How many there are, of all jobs."""
    seconds: float | None = None
    job: int = 0
    jobs: int = 1
    _done: int = 0
    _told: float = field(default_factory=time.monotonic)
    _started: float = field(default_factory=time.monotonic)

    def indexes(self) -> Iterator[int]:
        """Numbers of cases, until it is time to end."""
        for index in itertools.count(self.job, self.jobs):
            if self.over() or (self.cases is not None and index >= self.cases):
                break
            yield index
        self.flush()

    def over(self) -> bool:
        """It is time to end: enough was found, or the seconds are over."""
        late = self.seconds is not None and time.monotonic() > self._started + self.seconds
        return late or self.enough.is_set()

    def did(self, cases: int = 1) -> None:
        """So many cases were done."""
        self._done += cases
        if time.monotonic() - self._told > _TELL_EVERY:
            self.flush()

    def flush(self) -> None:
        """Tell what was done since the last time."""
        done, self._done, self._told = self._done, 0, time.monotonic()
        if done:
            self.tell("cases", done)


Work = Callable[[Any, Share], None]
"""A function of a module: what one job does, with the options of the run. Raises ConfigError."""


class _Collector:
    """Collection of what jobs tell, in one report."""

    def __init__(self, report: FuzzReport, stop: int, on_found: Callable[[Discovery], None]) -> None:
        self.report = report
        self.enough = threading.Event()
        self.progress = ProgressLine(report)
        self._stop = stop
        self._on_found = on_found

    def tell(self, what: str, value: object) -> None:
        report = self.report
        if what == "cases" and isinstance(value, int):
            report.cases += value
        elif what == "lines" and isinstance(value, tuple):
            report.lines, report.corpus = max(report.lines, value[0]), max(report.corpus, value[1])
        elif what == "found" and isinstance(value, Discovery):
            if report.add(value):
                self.progress.clear()
                self._on_found(value)
                if len(report.discoveries) >= self._stop:
                    self.enough.set()
        elif what == "progress" and isinstance(value, str):
            self.progress.say(value)
        elif what == "note" and isinstance(value, tuple):
            name, new = value
            old = report.notes.get(name)
            if isinstance(old, int) and isinstance(new, int):
                new += old
            elif isinstance(old, list) and isinstance(new, list):
                new = [*old, *new]
            report.notes[name] = max(old, new) if isinstance(old, float) else new
        elif what == "error":
            raise ConfigError(str(value))
        self.progress.tick()


def run_jobs(
    work: Work,
    options: object,
    report: FuzzReport,
    *,
    cases: int | None,
    seconds: float | None,
    jobs: int,
    stop: int,
    on_found: Callable[[Discovery], None],
) -> None:
    """Do the work in ``jobs`` processes (1: in this one), until ``stop`` different findings. Raises ConfigError."""
    collector = _Collector(report, stop, on_found)
    try:
        if jobs == 1:
            share = Share(collector.tell, collector.enough, cases, seconds)
            try:
                work(options, share)
            finally:
                share.flush()
        else:
            _in_processes(work, options, collector, cases, seconds, jobs)
    finally:
        report.ended = time.monotonic()
        collector.progress.clear()


def _in_processes(
    work: Work, options: object, collector: _Collector, cases: int | None, seconds: float | None, jobs: int
) -> None:
    context = multiprocessing.get_context("spawn")  # each has a trio of its own, and no descriptors of ours
    enough = context.Event()
    pipes: list[Connection[Any, Any]] = []
    processes = []
    try:
        for job in range(jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_job, args=(work, options, theirs, enough, cases, seconds, job, jobs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        _collect(dict(zip(pipes, processes, strict=True)), collector, enough)
    finally:
        enough.set()
        for process in processes:
            process.join(_END_TIMEOUT)
            if process.is_alive():
                process.kill()
        for pipe in pipes:
            pipe.close()


def _collect(jobs: "dict[Connection[Any, Any], SpawnProcess]", collector: _Collector, enough: Any) -> None:
    left = dict(jobs)
    while left:
        for pipe in wait(list(left), _LOOK_EVERY):
            assert isinstance(pipe, Connection)
            try:
                what, value = pipe.recv()
            except EOFError:
                process = left.pop(pipe)
                process.join(_END_TIMEOUT)
                if process.exitcode:  # as of a crash in native code, or an event loop that cannot be stopped
                    collector.tell("found", _death(list(jobs).index(pipe), process.exitcode))
                continue
            collector.tell(what, value)
        collector.progress.tick()
        if collector.enough.is_set():
            enough.set()


def _death(job: int, status: int) -> Discovery:
    what = f"the process of job {job} has ended with status {status}: its stderr may say more"
    return Discovery(f"job {job}", 0, Finding("died", what, "job"))


def _job(
    work: Work,
    options: object,
    pipe: "Connection[Any, Any]",
    enough: Any,
    cases: int | None,
    seconds: float | None,
    job: int,
    jobs: int,
) -> None:
    """What a process of its own does: it goes on through a Ctrl-C, and ends when the parent says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be for the whole group: the parent says when to end

    def tell(what: str, value: object) -> None:
        try:
            pipe.send((what, value))
        except OSError:
            os._exit(1)

    share = Share(tell, enough, cases, seconds, job, jobs)
    try:
        work(options, share)
        share.flush()
    except ConfigError as error:
        tell("error", error)
