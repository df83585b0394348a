"""Server in a process of its own, as a user starts it, and what that process uses."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.usage import Usage
from vfiouser_virtio.vm.debian import cache_dir

COMMAND = (sys.executable, "-m", "vfiouser_virtio", "serve", "--log-level", "warning")


def environment() -> dict[str, str]:
    """Where the compiled modules are kept as an installed package's are, whatever the caller has set or may write."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(cache_dir() / "pycache")}


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """Process of `vfiouser-virtio serve`, ready."""

    process: subprocess.Popen[str]
    paths: list[str]
    """The sockets of its devices."""
    started_s: float
    """From starting the process to its word that it is ready."""

    @property
    def usage(self) -> Usage:
        """Of its process and that one's children."""
        return Usage(self.process.pid)


@contextmanager
def server(
    devices: Sequence[str], *options: str, prefix: Sequence[str] = (), stderr: int | None = None
) -> Iterator[ServerProcess]:
    """Serve devices for as long as the block runs; ``stderr`` as for Popen, ``prefix`` a program that runs another."""
    words = [word for device in devices for word in ("--device", device)]
    begin = time.perf_counter()
    command = [*prefix, *COMMAND, *options, *words]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            assert process.stdout is not None
            paths = []
            for line in process.stdout:
                if line.startswith("device "):
                    paths.append(line.split(maxsplit=3)[3].rstrip("\n"))
                if line.startswith("ready"):
                    break
            else:
                raise RuntimeError(f"the server ended with status {process.wait()}")
            yield ServerProcess(process, paths, time.perf_counter() - begin)
        finally:
            process.terminate()


@contextmanager
def served(*devices: str) -> Iterator[list[str]]:
    """The same, where only the paths of the sockets matter."""
    with server(devices) as running:
        yield running.paths
