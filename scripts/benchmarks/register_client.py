"""Client that measures registers: registers.c where there is a C compiler, else Python."""

import os
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks.compiler import compile_c
from benchmarks.measure import Options
from vfiouser_virtio.testing.raw.blocking import BlockingClient


class MeasuredRegister(NamedTuple):
    """Addresses of a server's registers: 8 bytes that can be read, and 4 that can be written."""

    region: int
    read: int
    write: int


class RegisterClient(Protocol):
    """Connected client; times are in µs."""

    pid: int

    def read(self, count: int, think_us: int, *, polls: bool = False) -> float:
        """The median of round trips, each after a pause. ``polls``: it waits for the answer in poll(2), as QEMU does,
        not in recv(2)."""
        ...

    def write(self, count: int) -> float:
        """One of many posted writes."""
        ...


def compile_client(options: Options, folder: Path) -> Path | None:
    """registers.c compiled; None, and a note, where there is no C compiler."""
    program = compile_c("registers", folder)
    if program is None:
        options.note("no C compiler: the client is Python, and most of what is measured is its own time")
    return program


def connect(program: Path | None, path: str, register: MeasuredRegister, stack: ExitStack) -> RegisterClient:
    """A client for as long as the stack lasts; ``program`` is registers.c compiled."""
    if program is not None:
        return _InC(program, path, register, stack)
    return _InPython(stack.enter_context(BlockingClient(path)), register)


class _InC:
    def __init__(self, program: Path, path: str, register: MeasuredRegister, stack: ExitStack) -> None:
        command = [str(program), "client", path, str(register.region)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        stack.enter_context(process)
        self.pid = process.pid
        self._register = register

    def read(self, count: int, think_us: int, *, polls: bool = False) -> float:
        return self._ask(f"read {self._register.read} {count} {think_us} {int(polls)}")

    def write(self, count: int) -> float:
        return self._ask(f"write {self._register.write} {count}")

    def _ask(self, what: str) -> float:
        print(what, file=self._input, flush=True)
        return float(self._output.readline()) / 1e3


class _InPython:
    def __init__(self, client: BlockingClient, register: MeasuredRegister) -> None:
        self.pid = os.getpid()
        self._client = client
        self._register = register

    def read(self, count: int, think_us: int, *, polls: bool = False) -> float:  # noqa: ARG002 - most is its own time
        return statistics.median(self._round_trip(think_us) for _ in range(count))

    def _round_trip(self, think_us: int) -> float:
        if think_us:
            time.sleep(think_us / 1e6)
        begin = time.perf_counter()
        self._client.read(self._register.region, self._register.read, 8)
        return (time.perf_counter() - begin) * 1e6

    def write(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self._client.post(self._register.region, self._register.write, bytes(4))
        self._client.read(self._register.region, self._register.read, 8)
        return (time.perf_counter() - begin) * 1e6 / count
