"""Server process under attack: how it is started and ended, what it says, and what /proc says of it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from vfiouser_virtio.testing.fuzz.deadline import Deadline
from vfiouser_virtio.testing.fuzz.process.case import Stderr

TREE = Path(__file__).parents[4]
"""Folder of the package that runs here; another one's can be attacked as well."""
PATIENCE = 60.0
"""Seconds for what takes none: guards against waiting for ever, whatever else the machine does."""
_ATTACKERS_MEMORY = re.compile(rb"fuzz-\d+-\d+")
_READY = re.compile(rb"^ready \d+\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Holdings:
    """Resources of the server's processes, all together."""

    fds: int
    mappings: int
    memfds: tuple[str, ...]
    """Names of the attackers' memory that is mapped."""
    anonymous: int
    """Bytes of memory of their own: not those of clients, which they map."""


@cache
def can_supervise(tree: Path) -> bool:
    """Whether a tree's ``serve`` can start a device's process again."""
    command = [sys.executable, "-m", "vfiouser_virtio", "serve", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory(prefix="vu-") as folder:  # where nothing is that could be imported instead
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return "--supervise" in done.stdout


class ServerUnderAttack:
    """``serve`` of a tree, with its sockets in ``folder``; started by entering the block, killed at its end at last."""

    def __init__(
        self, folder: Path, devices: Sequence[str], options: Sequence[str], *, stderr: Stderr, tree: Path = TREE
    ) -> None:
        self.sockets = [str(folder / f"{number}.sock") for number in range(len(devices))]
        words = [word for device in devices for word in ("--device", device)]
        words += [word for path in self.sockets for word in ("--socket", path)]
        self._command = [sys.executable, "-m", "vfiouser_virtio", "serve", *options, *words]
        self._folder = folder
        self._mode = stderr
        self._tree = tree
        self.began = time.monotonic()
        self._said: list[bytes] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> "ServerUnderAttack":
        environment = os.environ | {"PYTHONPATH": str(self._tree), "XDG_RUNTIME_DIR": str(self._folder)}
        command = self._command
        if self._mode == "closed":
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        self.process = subprocess.Popen(
            command,
            cwd=self._folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._output = b""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._start_reader(self.process.stdout, self._hear_output)
        self._is_ready = threading.Event()
        if self._mode == "read":
            self._start_reader(self.process.stderr, self._said.append)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        # Where the kernel waits for a hung file system, the process ends when that is gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _start_reader(self, stream: IO[bytes], hear: Callable[[bytes], object]) -> None:
        self._readers.append(threading.Thread(target=_read, args=(stream, hear), daemon=True))
        self._readers[-1].start()

    def _hear_output(self, data: bytes) -> None:
        self._output += data
        if _READY.search(self._output):
            self._is_ready.set()

    # ---- its life ------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, if it has ended."""
        return self.process.poll()

    def wait_ready(self, seconds: float = PATIENCE) -> bool:
        """Whether it has said that it is ready; False at once when it has ended."""
        end = time.monotonic() + seconds
        while not self._is_ready.wait(0.02):
            if self.status is not None or time.monotonic() > end:
                return self._is_ready.wait(0.5)
        return True

    def terminate(self, seconds: float) -> bool:
        """SIGTERM; whether it has ended within so long, without waits for a CPU."""
        limit = Deadline(seconds, self.waited_seconds, at_once=True)
        self.process.terminate()
        while self.status is None and not limit.over():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(limit.left)
        return self.status is not None

    # ---- what it says --------------------------------------------------------------------------------------------

    def said(self) -> bytes:
        """All of its stderr until now; of an unread one, only once the server has ended."""
        if self._mode == "unread" and self.status is not None and not self._said:
            assert self.process.stderr is not None
            os.set_blocking(self.process.stderr.fileno(), False)
            self._said.append(self.process.stderr.read() or b"")
        return b"".join(self._said)

    # ---- what /proc says -----------------------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """Its process, the children of it (``--processes``), and theirs (``--supervise``)."""
        return descendants(self.pid)

    def device_pid(self, index: int) -> int:
        """The process in which a device runs, where each has its own."""
        pid = children(self.pid)[index]
        while below := children(pid):  # what keeps its client when it dies
            pid = below[0]
        return pid

    def holdings(self) -> Holdings:
        """Of all its processes; those that have ended hold nothing."""
        fds = mappings = 0
        names: set[str] = set()
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fds += len(os.listdir(f"/proc/{pid}/fd"))
                lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
                mappings += len(lines)
                names |= {found[0].decode() for line in lines if (found := _ATTACKERS_MEMORY.search(line))}
        return Holdings(fds, mappings, tuple(sorted(names)), self.anonymous())

    def anonymous(self) -> int:
        """Bytes of memory of its own (proc(5): RssAnon)."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        total += int(line.split()[1]) << 10
        return total

    def cpu_seconds(self) -> float:
        """CPU time that it has used so far (proc(5): utime and stime)."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def is_asleep(self) -> bool:
        """Whether all of its processes wait for something that is neither a CPU nor a disk (proc(5): state)."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "SZ":
                    return False
        return True

    def waited_seconds(self) -> float:
        """How long its main threads were ready to run and had no CPU (Linux, sched-stats.rst: /proc/PID/schedstat)."""
        return sum(map(waited_for_cpu, self.pids()))


def children(pid: int) -> list[int]:
    """Child processes, oldest first; none of one that is gone (proc(5): task/TID/children)."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """A process, the children of it, and theirs."""
    found = [pid]
    for each in found:  # which grows
        found += children(each)
    return found


def waited_for_cpu(pid: int) -> float:
    """Seconds for which a process's main thread was ready to run and had no CPU; 0 of one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def _read(stream: IO[bytes], hear: Callable[[bytes], object]) -> None:
    try:
        while data := os.read(stream.fileno(), 1 << 16):
            hear(data)
    except (OSError, ValueError):
        pass  # closed meanwhile
