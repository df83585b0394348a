"""A run that leaves files or processes behind fails, and says which."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.command import PATIENCE, environment
from support.left_behind import left_behind

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent

LEAVES = """
import subprocess, tempfile
from multiprocessing import resource_tracker

def test_leaves_a_file():
    tempfile.mkstemp(prefix="forgotten-")

def test_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    resource_tracker.ensure_running()
    with tempfile.TemporaryDirectory():
        subprocess.run("true", check=True)
"""


def run_suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of other tests with our conftest.py."""
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_it.py").write_text(LEAVES)
    env = environment()
    env.pop("PYTEST_XDIST_WORKER", None)
    env["PYTHONPATH"] += f":{TESTS}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_run_that_leaves_a_file_behind_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    ended = run_suite(tmp_path, *workers)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
    assert "2 passed" in ended.stdout
    assert "left behind by the tests" in ended.stdout
    assert ended.stdout.count("/forgotten-") == 1
    assert "resource_tracker" not in ended.stdout
    [line] = [line for line in ended.stdout.splitlines() if "/forgotten-" in line]
    assert not Path(line.removeprefix("file ")).parent.exists()


def test_a_run_that_leaves_nothing_does_not(tmp_path: Path) -> None:
    ended = run_suite(tmp_path, "-k", "nothing")
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout + ended.stderr
    assert "left behind" not in ended.stdout


def test_processes_are_found() -> None:
    folder = Path(tempfile.mkdtemp())
    env = {**environment(), "TMPDIR": str(folder)}
    with subprocess.Popen(["cat"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        assert process.stdout.read(1) == b"x"  # it is cat by now, not what becomes it
        [line] = left_behind(folder, patience=0)
        process.stdin.close()
    assert line == f"process {process.pid}: cat "
    assert not folder.exists()
