"""Benchmark of network devices: packets of our rings alone, then in two Linux guests, beside QEMU's own device.

From guest to guest it is our hub beside two QEMUs on ``-netdev stream``; from a guest to the host it is the same TAP
interface (without vhost, which is no back end but another device), and passt.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from benchmarks import net_rings
from benchmarks.compiler import compile_c
from benchmarks.measure import Benchmark, Options, Row, Target, at_least, at_most, turn
from benchmarks.net_scene import HUB, PASST, PORT, QEMU_PASST, QEMU_TAP, STREAM, TAP, Scene, may_reach_host, scene

_ROUND_TRIP = "round trip"
LOADS = {
    "tcp-out": ("TCP out", "MB/s"),
    "tcp-in": ("TCP in", "MB/s"),
    "udp-out": ("64-byte packets out", "k/s"),
    "udp-in": ("64-byte packets in", "k/s"),
    "rr": (_ROUND_TRIP, "us"),
}
"""Names of the load program's: metric and unit."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Networks that are compared."""

    name: str
    ours: str
    theirs: str
    contender: str
    throughput: Target
    packets: Target
    counts_cpu: bool = True
    """Our server does all of the work on the host's side."""

    def targets(self, load: str) -> Mapping[str, Target]:
        """For a load's metric."""
        target = {"tcp": self.throughput, "udp": self.packets}.get(load.partition("-")[0], at_most(1.1))
        return {self.contender: target}


PAIRS = (
    Pair("guest to guest", HUB, STREAM, "QEMU, stream", at_least(1.5), at_least(0.95)),
    Pair("tap", TAP, QEMU_TAP, "QEMU, tap", at_least(1.0), at_least(0.95)),
    Pair("passt", PASST, QEMU_PASST, "QEMU, passt", at_least(1.0), at_least(0.95), counts_cpu=False),
)


def run(options: Options) -> list[Row]:
    """The rings first, as they take no guest."""
    rows = net_rings.rows(options)
    wanted = [(pair, load) for pair in PAIRS for load in LOADS if options.wants(f"{pair.name}: {LOADS[load][0]}")]
    if not wanted:
        return rows
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # passt is nobody
        program = compile_c("netload", folder, "-static")
        if program is None:
            options.note("no C compiler: there is no load for guests")
            return rows
        if not may_reach_host():
            options.note("guests do not reach the host: that takes root, /dev/net/tun, iproute2 and util-linux")
            wanted = [(pair, load) for pair, load in wanted if pair.ours == HUB]
        return [*rows, *trio.run(_run, options, wanted, program, folder)]


async def _run(options: Options, wanted: list[tuple[Pair, str]], program: Path, folder: Path) -> list[Row]:
    figures: dict[tuple[Pair, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    options.progress("boot")
    async with scene(program, folder) as made:
        for number in range(options.rounds):
            for pair, load in wanted:
                options.progress(f"{pair.name}: {LOADS[load][0]}, round {number + 1}")
                found = figures[pair, load]
                for network in turn((pair.ours, pair.theirs), number):
                    side = "ours" if network == pair.ours else "theirs"
                    used = made.usage.cpu_s
                    figure, total, *more = await _measure(made, network, load, options)
                    found[side].append(1e6 / figure if load == "rr" else figure)
                    if more:
                        found[f"{side} p99"].append(more[0])
                    if side == "ours":
                        found["cpu"].append((made.usage.cpu_s - used) * 1e6 / max(total, 1))
    return [row for (pair, load), those in figures.items() for row in _rows(pair, load, those)]


async def _measure(made: Scene, network: str, load: str, options: Options) -> list[float]:
    way = made.ways[network]
    ms = 200 if options.quick else 1000
    said = (await way.guest.run(f"netload {load} {way.address} {PORT} {ms}", check=True, timeout=60)).output
    return [float(word) for word in said.split()]


def _rows(pair: Pair, load: str, figures: Mapping[str, list[float]]) -> list[Row]:
    metric, unit = LOADS[load]
    name = f"{pair.name}: {metric}"
    rows = [_row(name, unit, figures, pair, pair.targets(load))]
    if load == "rr":
        rows.append(_row(f"{name}, p99", unit, figures, pair, {}, " p99"))
    if pair.counts_cpu:
        each, scale, unit = {"MB/s": ("MB", 1e3, "ms"), "k/s": ("packet", 1, "us"), "us": ("round trip", 1, "us")}[unit]
        rows.append(
            Row(metric=f"{name}, server CPU per {each}", unit=unit, ours=[cpu * scale for cpu in figures["cpu"]])
        )
    return rows


def _row(
    name: str, unit: str, figures: Mapping[str, list[float]], pair: Pair, targets: Mapping[str, Target], kind: str = ""
) -> Row:
    ours, theirs = figures[f"ours{kind}"], figures[f"theirs{kind}"]
    return Row(metric=name, unit=unit, ours=ours, theirs={pair.contender: theirs}, targets=targets)


BENCHMARK = Benchmark(
    name="net", summary="network devices: packets, throughput, round trips, beside QEMU's own", run=run
)
