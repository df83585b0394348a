"""Benchmark of register accesses: one client measures our server, and libvfio-user's sample server in C, in turn."""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import guest_config
from benchmarks.libvfio_user import REGISTER as THEIR_REGISTER
from benchmarks.libvfio_user import find_sample, listening
from benchmarks.measure import Benchmark, Options, Row, Target, at_most, in_turn
from benchmarks.register_client import MeasuredRegister, RegisterClient, compile_client, connect
from benchmarks.server import server
from vfiouser_virtio.protocols.vfio_user import PciRegion

# Our disk's capacity, and the common configuration's driver_feature_select.
OUR_REGISTER = MeasuredRegister(region=PciRegion.BAR4, read=0x2000, write=8)
_LIBVFIO_USER = "libvfio-user"


@dataclass(frozen=True, slots=True)
class End:
    """Server and a client of it."""

    client: RegisterClient
    server_pid: int

    def measure(self, cpus: tuple[int, int], measure: Callable[[RegisterClient], float]) -> float:
        """A figure with the client on the first CPU and the server on the second."""
        _pin(self.client.pid, cpus[0])
        _pin(self.server_pid, cpus[1])
        return measure(self.client)


def _pin(pid: int, cpu: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})


def run(options: Options) -> list[Row]:
    """Over the socket alone, then through QEMU."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        program = compile_client(options, folder)
        running = stack.enter_context(server(["blk,size=1M"]))
        ends = {"ours": End(connect(program, running.paths[0], OUR_REGISTER, stack), running.process.pid)}
        ends |= _their_end(options, program, folder, stack)
        rows = access_rows(options, ends)
    if options.libvfio_user:
        rows.append(guest_config.read_through_qemu(options, find_sample(options.libvfio_user)))
    return rows


def _their_end(options: Options, program: Path | None, folder: Path, stack: ExitStack) -> dict[str, End]:
    socket = folder / "theirs.sock"
    if options.libvfio_user:
        process = stack.enter_context(listening([str(find_sample(options.libvfio_user)), str(socket)], socket))
        return {_LIBVFIO_USER: End(connect(program, str(socket), THEIR_REGISTER, stack), process.pid)}
    options.note("targets are for libvfio-user: see --libvfio-user")
    if program is None:
        return {}
    process = stack.enter_context(listening([str(program), "server", str(socket)], socket))
    return {"C echo": End(connect(program, str(socket), THEIR_REGISTER, stack), process.pid)}


def access_rows(options: Options, ends: dict[str, End]) -> list[Row]:
    """One of ``ends`` is named "ours"; targets are for one that is libvfio-user's own sample."""
    cpus = sorted(os.sched_getaffinity(0))
    same, apart = (cpus[0], cpus[0]), (cpus[0], cpus[-1])
    few = 20 if options.quick else 1
    table: Sequence[tuple[str, tuple[int, int], Callable[[RegisterClient], float], Target]] = (
        ("read, same CPU", same, lambda client: client.read(4000 // few, 0), at_most(1.25)),
        ("read by poll(), same CPU", same, lambda client: client.read(4000 // few, 0, polls=True), at_most(1.25)),
        ("read, two CPUs", apart, lambda client: client.read(2000 // few, 0), at_most(0.8)),
        ("read, two CPUs, every 300 us", apart, lambda client: client.read(400 // few, 300), at_most(1.1)),
        ("posted write, two CPUs", apart, lambda client: client.write(40_000 // few), at_most(0.7)),
    )
    rows = []
    for metric, places, measure, target in table:
        options.progress(metric)
        contenders = {name: partial(end.measure, places, measure) for name, end in ends.items()}
        for once in contenders.values():
            once()
        figures = in_turn(contenders, 3 * options.rounds)
        ours = figures.pop("ours")
        rows.append(Row(metric=metric, unit="us", ours=ours, theirs=figures, targets={_LIBVFIO_USER: target}))
    return rows


BENCHMARK = Benchmark(name="registers", summary="a register's round trip, and posted writes", run=run)
