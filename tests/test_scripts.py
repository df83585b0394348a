"""What the scripts share, ``scripts/lib.sh``; and that ``scripts/check`` fails where any of its checks does."""

import os
import pty
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

LIBRARY = Path(__file__).parents[1] / "scripts/lib.sh"


def shell(script: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-c", f". '{LIBRARY}'; {script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


def test_a_quiet_command_is_heard_only_when_it_fails(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    well = shell("quietly sh -c 'echo much'; echo after", env=env)
    assert (well.returncode, well.stdout, well.stderr) == (0, "after\n", "")
    badly = shell("quietly sh -c 'echo much; exit 3'; echo after", env=env)
    assert (badly.returncode, badly.stdout, badly.stderr) == (3, "", "much\n")
    assert list(tmp_path.iterdir()) == []


def test_a_quiet_command_gives_a_sign_of_life_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    # It ends when it has been seen to live, however long that takes.
    script = f". '{LIBRARY}'; quietly sh -c 'echo at work; until [ -e {tmp_path}/seen ]; do sleep 0.1; done'"
    with subprocess.Popen(["bash", "-c", script], stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        printed = b""
        while b"s: at work" not in printed:
            printed += os.read(ours, 4096)
        (tmp_path / "seen").touch()
        assert process.wait(60) == 0
    os.close(ours)


CHECKS = [
    "ruff format --check .",
    "ruff check .",
    "mypy",
    "pyright --pythonpath .venv/bin/python",
    "lint-imports --no-cache",
]


@pytest.mark.parametrize("failing", ["none of them", *CHECKS])
def test_each_check_counts(failing: str, tmp_path: Path) -> None:
    """With stand-ins for the tools: all are asked, and what one of them says is the script's status."""
    check = tmp_path / "check"
    check.write_bytes(LIBRARY.with_name("check").read_bytes())
    (tmp_path / "lib.sh").write_text(
        f"set -euo pipefail\nsay() {{ :; }}\nmain_venv() {{ :; }}\n"
        f'tool() {{ printf "%s\\n" "$*" >&2; [ "$*" != "{failing}" ]; }}\n'
        + "".join(f'{name}() {{ tool {name} "$@"; }}\n' for name in ("ruff", "mypy", "pyright", "lint-imports"))
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(["bash", check], capture_output=True, text=True, timeout=60, check=False, env=env)
    if failing in CHECKS:
        assert ended.returncode != 0
    else:
        assert (ended.returncode, sorted((ended.stdout + ended.stderr).splitlines())) == (0, sorted(CHECKS))
