"""Benchmark of an idle server: start, memory, and idle devices, which must cost nothing."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from benchmarks.measure import Benchmark, Options, Row, at_most, in_turn
from benchmarks.server import ServerProcess, environment, server
from vfiouser_virtio.testing.raw.blocking import BlockingClient

_DEVICE = "blk,size=1M"


def run(options: Options) -> list[Row]:
    """Starts in turn with a bare Python; then one to 100 devices in one process; then the same, idle."""
    return [*_starts(options), *_sizes(options), *_idle(options)]


def _starts(options: Options) -> list[Row]:
    options.progress("start")
    contenders: dict[str, Callable[[], float]] = {
        "ours": partial(_start, 1),
        "python -c pass": partial(_python, "pass"),
        "python -c 'import trio'": partial(_python, "import trio"),
    }
    for start in contenders.values():
        start()  # caches
    figures = in_turn(contenders, 2 * options.rounds)
    return [
        Row(
            metric="start to ready",
            unit="ms",
            ours=figures.pop("ours"),
            theirs=figures,
            targets={"": at_most(150)},
        )
    ]


def _counts(options: Options) -> tuple[int, ...]:
    """How many devices in one process."""
    return (1, 10) if options.quick else (1, 10, 100)


def _start(count: int) -> float:
    with server([_DEVICE] * count) as running:
        return running.started_s * 1000


def _python(program: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
    return (time.perf_counter() - begin) * 1000


def _sizes(options: Options) -> list[Row]:
    counts = _counts(options)
    most = counts[-1]
    took: dict[int, list[float]] = {count: [] for count in counts}
    memory: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(options.rounds):
        for count in counts:
            options.progress(f"{count} devices, round {number + 1}")
            with server([_DEVICE] * count) as running:
                took[count].append(running.started_s * 1000)
                memory[count].append(running.usage.memory_mb)
    further = [(many - one) / (most - 1) for one, many in zip(memory[1], memory[most], strict=True)]
    return [
        *(
            Row(metric=f"start to ready, {count} devices", unit="ms", ours=took[count], theirs={"1 device": took[1]})
            for count in counts[1:]
        ),
        Row(metric="memory, 1 device", unit="MB", ours=memory[1], targets={"": at_most(40)}),
        Row(metric=f"memory, each further of {most} devices", unit="MB", ours=further, targets={"": at_most(1)}),
    ]


def _idle(options: Options) -> list[Row]:
    rows = []
    for count in (1, _counts(options)[-1]):
        options.progress(f"{count} idle devices")
        with server([_DEVICE] * count) as running, ExitStack() as stack:
            for path in running.paths:
                client = stack.enter_context(BlockingClient(path))
                client.start()
                client.kick()  # or else it is looked at now and then, as a driver that may never notify
            cpu, switches = _while_idle(running, 0.2 if options.quick else 3.0)
        devices = f"{count} idle device{'s' if count > 1 else ''}"
        rows += [
            Row(metric=f"CPU of {devices}", unit="ms/s", ours=[cpu], targets={"": at_most(0)}),
            Row(metric=f"wake-ups of {devices}", unit="/s", ours=[switches], targets={"": at_most(0)}),
        ]
    options.note("idle devices have a client and a driver that has notified once, and no requests")
    return rows


def _while_idle(running: ServerProcess, seconds: float) -> tuple[float, float]:
    """CPU time in ms per second, and wake-ups per second."""
    time.sleep(1.5)  # what the clients asked for is over, and the last look at what could have followed
    cpu, switches = running.usage.cpu_s, running.usage.switches
    time.sleep(seconds)
    return (running.usage.cpu_s - cpu) * 1000 / seconds, (running.usage.switches - switches) / seconds


BENCHMARK = Benchmark(name="startup", summary="start, memory, and the cost of idle devices", run=run)
