"""A device file is a command: ``python3 pattern.py KEY=VALUE …`` serves its device."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command import PATIENCE, environment

from vfiouser_virtio import Device, main
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.vfio_user import connect

_FILE = '''
"""An entropy device that is not random at all."""

from typing import Annotated

from vfiouser_virtio import ConfigError, Device, main, queue


class Pattern(Device):
    device_id = 4
    requestq = queue(max_size=8)

    def __init__(self, *, pattern: Annotated[str, "hexadecimal digits, used over and over"] = "deadbeef") -> None:
        super().__init__()
        try:
            self.pattern = bytes.fromhex(pattern)
        except ValueError as error:
            raise ConfigError(f"pattern={pattern}: {error}") from None


if __name__ == "__main__":
    main(Pattern)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pattern.py"
    path.write_text(_FILE)
    return path


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, file.name, *arguments],
        cwd=file.parent,
        env=environment(COLUMNS="120"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@contextmanager
def served(file: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, and what it prints until it is ready."""
    command = [sys.executable, file.name, *arguments]
    with subprocess.Popen(command, cwd=file.parent, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if "ready" in line:
                    break
            yield process, lines
        finally:
            process.kill()


async def test_it_serves_and_prints_what_qemu_needs(file: Path) -> None:
    path = file.parent / "p.sock"
    with served(file, "pattern=c0ffee00", f"socket={path}", "--once", "id=mine") as (process, lines):
        assert lines[0] == f"device mine pattern.py {path}"
        assert any(f'"id":"mine","socket":{{"type":"unix","path":"{path}"}}' in line for line in lines)
        assert lines[-1] == "ready 1"
        async with connect(str(path)):
            pass
        assert process.wait(PATIENCE) == 0  # --once


def test_for_programs(file: Path) -> None:
    with served(file, "--json", "--socket", f"{file.parent}/s") as (process, lines):
        device, ready = map(json.loads, lines)
        assert (device["name"], device["socket"], ready) == (
            "pattern0",
            f"{file.parent}/s",
            {"event": "ready", "devices": 1},
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_help_teaches(file: Path) -> None:
    ended = run(file, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for text in (
        "usage: python3 pattern.py [KEY=VALUE …] [options]",
        "An entropy device that is not random at all: serve it",
        "pattern=TEXT                    hexadecimal digits, used over and over; default: deadbeef",
        "socket=PATH",
        "packed=on|off",
        "--once",
        "vfiouser-virtio run --device pattern.py:Pattern",
        "exit status:",
    ):
        assert text in ended.stdout, text
    assert "\n  --processes" not in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["patern=c0"], 2, 'pattern.py: no option "patern"; did you mean "pattern"? (options: pattern, id, socket'),
        (["pattern=xyz"], 2, "pattern.py: pattern=xyz: non-hexadecimal number found in fromhex() arg at position 0"),
        (["pattern=00", "pattern=11"], 2, "pattern.py: pattern is given 2 times, expected a text"),
        (["vectors=4000"], 2, "pattern.py: vectors=4000: expected 0 to 2048 (the limit of MSI-X)"),
        (["socket=/nonexistent/a.sock"], 3, "/nonexistent/a.sock"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_is_one_line(file: Path, arguments: list[str], status: int, message: str) -> None:
    ended = run(file, *arguments)
    assert ended.returncode == status
    assert ended.stdout == ""
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_bug_in_the_annotations_is_one_line(file: Path) -> None:
    file.write_text(_FILE.replace('Annotated[str, "hex', 'Annotated["NoSuchType", "hex'))
    ended = run(file)
    assert ended.returncode == 2
    assert "Pattern.__init__: bad annotation: name 'NoSuchType' is not defined" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_same_file_with_the_command(file: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "vfiouser_virtio", "list-devices", "pattern.py:Pattern"],
        cwd=file.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "pattern=TEXT" in ended.stdout, ended.stderr


def test_what_is_no_class() -> None:
    class Half(Device):
        device_id = 4

    with pytest.raises(AuthorError, match=r"expected a subclass of vfiouser_virtio\.Device, .* and no object of it"):
        main(Half())  # type: ignore[arg-type]  # an object where main() wants a class: that is the point
