"""Sample server of a build of libvfio-user (C), which the user names with --libvfio-user."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.register_client import MeasuredRegister
from vfiouser_virtio.errors import ConfigError

# Its BAR2 is 256 bytes that mean nothing. (Its sample called "server" does not start: a BAR of three pages.)
_SAMPLE = "gpio-pci-idio-16"
REGISTER = MeasuredRegister(region=2, read=0, write=8)


def find_sample(build: Path) -> Path:
    """The program. Raises ConfigError when that folder has none."""
    found = next((path for path in sorted(build.rglob(_SAMPLE)) if path.is_file()), None)
    if found is None:
        raise ConfigError(f"--libvfio-user {build}: no program {_SAMPLE} in it: give the folder of a finished build")
    return found


@contextmanager
def listening(command: list[str], socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that says nothing when it is ready: wait for its socket. Raises ConfigError when it ends instead."""
    with subprocess.Popen(command) as process:
        try:
            while not socket.exists():
                if process.poll() is not None:
                    raise ConfigError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.01)
            # bind() makes the file, listen() comes after it.
            time.sleep(0.05)
            yield process
        finally:
            process.kill()
