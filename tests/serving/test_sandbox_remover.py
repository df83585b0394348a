"""The process that removes what a sandboxed one has made: what it removes, and what not."""

import json
import subprocess
import sys
from pathlib import Path

from support.command import environment

_ASKS_FOR = """
import errno, json, os, signal, sys
from pathlib import Path
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.removal import end_remover, remove_file, remove_folder
from vfiouser_virtio.serving.sandbox_remover import start_remover

def came_of(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

for name in ("mine", "replaced", "other", "late"):
    Path(name).touch()
Path("empty").mkdir()
Path("full").mkdir()
Path("full/file").touch()
folders = (Path("empty"), Path("full"))
files = (Path("mine"), Path("../served/replaced"), Path("missing"), Path("late"))
start_remover(HostAccess(removes=files, removes_folders=folders), lambda access: None)
Path("new").touch()
os.rename("new", "replaced")
Path("missing").touch()
results = {
    name: came_of(lambda: remove_file(name)) for name in ("mine", "replaced", "missing", "other", "empty", "x" * 9000)
}
results |= {name + "/": came_of(lambda: remove_folder(name)) for name in ("empty", "full", "other")}
[child] = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
print(json.dumps([results, Path(f"/proc/{child}/comm").read_text()]))
if "killed" in sys.argv:
    os.kill(child, signal.SIGKILL)
    assert came_of(lambda: remove_file("late")) in ("EPIPE", "ECONNRESET")
    assert came_of(lambda: remove_file("late")) == "done"  # by ourselves, where we may
end_remover()
assert not os.path.exists(f"/proc/{child}") or "killed" in sys.argv
"""


def ask(folder: Path, *arguments: str) -> tuple[dict[str, str], str]:
    folder.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", _ASKS_FOR, *arguments],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    results, name = json.loads(ended.stdout)
    return results, name


def test_only_what_it_was_told_and_what_is_still_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    results, name = ask(folder)
    assert results == {
        "mine": "done",
        "replaced": "EPERM",
        "missing": "EPERM",
        "other": "EPERM",
        "empty": "EPERM",  # it was named as a folder
        "x" * 9000: "EPERM",
        "empty/": "done",
        "full/": "ENOTEMPTY",
        "other/": "EPERM",
    }
    assert name == "remover\n"
    assert {path.name for path in folder.iterdir()} == {"replaced", "missing", "other", "full", "late"}


def test_one_that_was_killed(tmp_path: Path) -> None:
    ask(tmp_path / "served", "killed")
    assert not (tmp_path / "served" / "late").exists()
