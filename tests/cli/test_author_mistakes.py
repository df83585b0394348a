"""Mistakes in a device file of the user's: one line with the author's line, and an exit status, of every command."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.command import run_command

DEVICES = """
import sys
from vfiouser_virtio.virtio import Device, queue

class Raises(Device):
    device_id = 63
    def __init__(self):
        super().__init__()
        self.helper()
    def helper(self):
        return {}["key"]

class Forgets(Device):
    device_id = 63
    requestq = queue()
    def __init__(self):
        pass

class ForgetsFirst(Device):
    device_id = 63
    requestq = queue()
    def __init__(self):
        self.size = self.requestq.size
        super().__init__()

class Typo(Device):
    device_id = 63
    driver_writes = frozenset({"wce"})

class Reserved(Device):
    device_id = 63
    def __init__(self):
        super().__init__(features=1 << 33)

class Plain(Device):
    device_id = 63
    def run(self):
        pass

class HalfMade(Device):
    device_id = 63
    def close(self):
        self.file.close()
    def run(self):
        pass

class ForgetsConfig(Device):
    device_id = 63
    def __init__(self):
        self.limit = self.config["limit"]
        super().__init__()
"""


MISTAKES = [
    ("Raises", 11, "__init__ raised KeyError: 'key'"),
    ("Forgets", 13, "Forgets: its __init__ does not call super().__init__()"),
    ("ForgetsFirst", 23, "there is no self.requestq before its __init__ has called super().__init__()"),
    ("ForgetsConfig", 50, "there is no self.config before its __init__ has called super().__init__()"),
    ("Typo", 26, "Typo: driver_writes names wce, which is no field of its configuration"),
    ("Reserved", 30, "has the reserved bit 33 (ACCESS_PLATFORM)"),
    ("Plain", 35, "Plain: run() is not async"),
    ("HalfMade", 40, "HalfMade: run() is not async"),
]


@pytest.mark.parametrize(("name", "line", "words"), MISTAKES)
def test_one_line_says_where_it_is(tmp_path: Path, name: str, line: int, words: str) -> None:
    check_one_line(tmp_path, [], name, line, words)


# The processes differ from the rest in who says it, not in what: one of the mistakes is enough in the plain run.
@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "line", "words"),
    [MISTAKES[0], *(pytest.param(*each, marks=pytest.mark.variant) for each in MISTAKES[1:])],
)
def test_one_line_says_where_it_is_from_a_process_of_its_own(tmp_path: Path, name: str, line: int, words: str) -> None:
    check_one_line(tmp_path, ["--processes"], name, line, words)


def check_one_line(folder: Path, options: Sequence[str], name: str, line: int, words: str) -> None:
    (folder / "mine.py").write_text(DEVICES)
    done = run_command("serve", *options, "--device", f"mine.py:{name}", cwd=folder)
    assert done.returncode == 4
    [told] = done.stderr.splitlines()
    assert told.startswith(f"vfiouser-virtio: mine.py:{name}: a bug in the device: mine.py:{line}: ")
    assert words in told


def test_the_traceback_is_there_for_the_asking(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DEVICES)
    done = run_command("serve", "--log-level", "debug", "--device", "mine.py:Raises", cwd=tmp_path)
    assert done.returncode == 4
    assert 'return {}["key"]' in done.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\nsys.exit('no')\n", "line 2: SystemExit: no"),
        (
            "from vfiouser_virtio.virtio import Device, queue\nclass D(Device):\n    queues = queue()\n",
            "line 2: AuthorError: D: a queue cannot be called 'queues'",
        ),
        (
            "from vfiouser_virtio.virtio import Device, queue\nclass D(Device):\n    requestq = queue(100)\n",
            "line 3: AuthorError: queue(max_size=100): expected a power of two, 1 to 32768",
        ),
    ],
)
def test_files_that_end_while_they_are_imported(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    done = run_command("serve", "--device", "mine.py:D", cwd=tmp_path)
    assert done.returncode == 2
    [told] = done.stderr.splitlines()
    assert words in told
