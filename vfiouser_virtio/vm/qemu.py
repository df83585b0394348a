"""QEMU that has vfio-user-pci: the user's own if it is new enough, else Debian's, unpacked into the cache."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.parent_death import ending_with_us
from vfiouser_virtio.vm import debian, programs

ENVIRONMENT_VARIABLE = "VFIOUSER_VIRTIO_QEMU"
# The first release with the vfio-user client, `-device vfio-user-pci`.
MINIMUM_VERSION = (10, 1, 0)

_PROGRAM = "qemu-system-x86_64"
_SUITE = "trixie-backports"
_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Qemu:
    """QEMU to run: `argv_prefix` and then QEMU's options, with `env` added to the environment."""

    argv_prefix: tuple[str, ...]
    version: tuple[int, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line to run it with these options. It does not outlive the thread that starts it."""
        if self.version >= (11, 0):
            return [*self.argv_prefix, *arguments, "-run-with", "exit-with-parent=on"]
        return ending_with_us([*self.argv_prefix, *arguments])

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment to run it with."""
        return {**os.environ, **self.env}


def find_qemu(path: str | os.PathLike[str] | None = None) -> Qemu:
    """QEMU 10.1 or newer: `path`, else `$VFIOUSER_VIRTIO_QEMU`, else the one in PATH, else one fetched into the cache.

    Raises ConfigError when a QEMU that was named cannot be used, or none can be fetched.
    """
    named = os.fspath(path) if path is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return _examine(named)
    if installed := shutil.which(_PROGRAM):
        try:
            return _examine(installed)
        except ConfigError as error:
            debian.progress(f"{error}; using one of our own")
    return fetch_qemu()


def fetch_qemu() -> Qemu:
    """Debian's QEMU from the cache, fetched at the first call. Raises ConfigError when that cannot be."""
    if platform.machine() != "x86_64":
        raise ConfigError(f"QEMU can be fetched on x86_64 only, not {platform.machine()}: install QEMU 10.1 or newer")
    root = debian.fetch("qemu", ["qemu-system-x86"], suite=_SUITE, what="QEMU", megabytes=38)
    # QEMU's own files, and the firmware, which is a package of its own.
    prefix = (*programs.argv(root, _PROGRAM), "-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios")
    modules = next(iter(root.glob("usr/lib/*/qemu")), root)
    # The version is known by the folder being complete, but which one it is only QEMU can tell.
    return Qemu(prefix, _version(prefix), {"QEMU_MODULE_DIR": str(modules)})


def _examine(path: str) -> Qemu:
    if shutil.which(path) is None:
        raise ConfigError(f"QEMU: there is no program {path}")
    version = _version((path,))
    if version < MINIMUM_VERSION:
        shown = ".".join(map(str, version))
        raise ConfigError(f"QEMU {shown} at {path} is too old: vfio-user-pci needs QEMU 10.1 or newer")
    if '"vfio-user-pci"' not in _output((path, "-device", "help")):
        raise ConfigError(f"QEMU at {path} was built without vfio-user-pci")
    return Qemu((path,), version)


def _version(prefix: tuple[str, ...]) -> tuple[int, ...]:
    printed = _output((*prefix, "--version"))
    match = _VERSION.search(printed)
    if match is None:
        raise ConfigError(f"{prefix[0]} is not QEMU: --version says {printed.strip()[:80]!r}")
    return tuple(int(number) for number in match.groups())


def _output(command: tuple[str, ...]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {Path(command[0])}: {error}") from None
    return result.stdout
