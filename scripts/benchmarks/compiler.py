"""C compiler for the programs beside the benchmarks, where there is one."""

import shutil
import subprocess
from pathlib import Path

from vfiouser_virtio.errors import ConfigError


def compile_c(name: str, folder: Path, *flags: str) -> Path | None:
    """The program of ``name``.c, made in ``folder`` with these flags as well; None when this machine has no C compiler.

    Raises ConfigError, with what the compiler says, when it does not compile.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    program = folder / name
    command = [compiler, "-O2", "-pthread", *flags, "-o", str(program), str(Path(__file__).parent / f"{name}.c")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ConfigError(f"{name}.c does not compile:\n{result.stderr}")
    return program
