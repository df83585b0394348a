"""What a run of the suite leaves behind: files in the temporary folder, and processes that live on. Nothing may.

The run has a temporary folder of its own, in `TMPDIR` and `XDG_RUNTIME_DIR` of all its processes. So what is in it
afterwards is the run's, and so is every process that has the folder in its environment.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

# A killed process takes its time, on a busy machine.
_PATIENCE = 20.0
_VARIABLES = ("TMPDIR", "XDG_RUNTIME_DIR")
# Started by `multiprocessing` for a "spawn" in this very process, with whose end it ends: where there are no workers.
_ENDS_WITH_US = b"from multiprocessing.resource_tracker import main"


def own_temporary_folder() -> Path:
    """Make one, and have this process and its children use it. Its path is short: sockets are made there."""
    before = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="vu-")
    # For sockets that other users reach; what is in it has a mode of its own.
    os.chmod(folder, 0o711)
    # The tests' own folders (`tmp_path`) are where pytest puts them anyway, and go when their test has passed.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", before)
    os.environ.update(dict.fromkeys(_VARIABLES, folder))
    tempfile.tempdir = folder
    return Path(folder)


def left_behind(folder: Path, patience: float = _PATIENCE) -> list[str]:
    """A line for each file and each process; the folder is gone after this."""
    end = time.monotonic() + patience
    while (alive := _processes(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    found = [f"process {pid}: {command}" for pid, command in alive.items()]
    found += [f"{'folder' if path.is_dir() else 'file'} {path}" for path in sorted(folder.rglob("*"))]
    shutil.rmtree(folder)
    return found


def _processes(folder: Path) -> dict[int, str]:
    """Command lines of the processes, other than this, that were started with this temporary folder."""
    wanted = f"TMPDIR={folder}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()  # before the command: of one that begins, it is set later
            command = (entry / "cmdline").read_bytes()
            if wanted in environment.split(b"\0") and _ENDS_WITH_US not in command:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone, or somebody else's
    return found
