"""What a process that has entered the sandbox can do and what not: `sandboxed_child` started, and what it says."""

import json
import subprocess
import sys
from pathlib import Path

from support.command import environment

CHILD = Path(__file__).parent / "sandboxed_child.py"


def attempts(tmp_path: Path, *rights: str, terminal: int | None = None) -> dict[str, str]:
    """What came of each attempt: ``done``, or the name of an error. ``terminal`` is its standard input and error."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "folder" / "theirs").touch()
    (tmp_path / "opened").write_bytes(bytes(4096))
    process = subprocess.Popen(
        [sys.executable, str(CHILD), str(tmp_path / "folder"), str(tmp_path / "opened"), *rights],
        env=environment(),
        stdin=subprocess.PIPE if terminal is None else terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if terminal is None else terminal,
        text=True,
    )
    printed, complained = process.communicate()
    assert (process.returncode, complained or "") == (0, "")
    results: dict[str, str] = json.loads(printed)
    return results
