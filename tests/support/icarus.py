"""Icarus Verilog: the machine's own, or Debian's, unpacked into the cache as QEMU is, without root."""

import os
import shutil
from pathlib import Path

from vfiouser_virtio.vm import debian, programs

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
# Compiler and preprocessor are programs that `iverilog` starts by their path in its base folder, by the host's loader.
_PROGRAMS = {"ivl": f"{_LIBRARIES}/ivl/ivl", "ivlpp": f"{_LIBRARIES}/ivl/ivlpp"}


def icarus() -> Path | None:
    """The folder with ``iverilog`` and ``vvp``, to be the first of PATH; None where the machine has them itself.

    Raises ConfigError when they cannot be had.
    """
    if shutil.which("iverilog") and shutil.which("vvp"):
        return None
    root = debian.fetch("iverilog", ["iverilog"], what="Icarus Verilog", megabytes=6, finish=_finish)
    return root / "bin"


def with_icarus(environment: dict[str, str]) -> dict[str, str]:
    """The environment in which it is found."""
    folder = icarus()
    if folder is None:
        return environment
    return environment | {"PATH": f"{folder}{os.pathsep}{environment.get('PATH', os.defpath)}"}


def _finish(root: Path) -> None:
    """Put scripts in front of the programs, which find the tree's loader and libraries from where they lie."""
    for name, place in _PROGRAMS.items():
        program = root / place
        program.rename(program.with_name(f"{name}.bin"))
        _wrap(program, f'"$here/{name}.bin"', root)
    (root / "bin").mkdir()
    for name, options in (("iverilog", f'-B "$here/../{_LIBRARIES}/ivl"'), ("vvp", f'-M "$here/../{_LIBRARIES}/ivl"')):
        _wrap(root / "bin" / name, f'"$here/../usr/bin/{name}" {options}', root)


def _wrap(script: Path, command: str, root: Path) -> None:
    libraries = os.path.relpath(root / _LIBRARIES, script.parent)
    loader = os.path.relpath(programs.loader(root), script.parent)
    script.write_text(
        '#!/bin/sh\nhere=$(cd "$(dirname "$0")" && pwd)\n'
        f'exec "$here/{loader}" --library-path "$here/{libraries}" --argv0 {script.name} {command} "$@"\n'
    )
    script.chmod(0o755)
