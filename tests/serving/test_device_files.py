"""Device classes from the user's own files."""

import subprocess
import sys
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.device_files import load_device_class
from vfiouser_virtio.virtio import Device

GOOD = """
from dataclasses import dataclass
from typing import Annotated
from helper_beside_it import ANSWER
from vfiouser_virtio.virtio import Device, queue

@dataclass
class Record:
    value: "int"

class Mine(Device):
    device_id = 42
    requestq = queue()

    def __init__(self, *, number: Annotated[int, "some number"] = ANSWER) -> None:
        super().__init__()
        self.number = number

class Unfinished(Device):
    pass

loaded = []
loaded.append(1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "helper_beside_it.py").write_text("ANSWER = 42\n")
    (tmp_path / "mine.py").write_text(GOOD)
    return tmp_path


def test_what_lies_beside_its_folder_can_be_imported(folder: Path) -> None:
    parts = folder / "parts_of_a_device"
    parts.mkdir()
    (parts / "answer.py").write_text("ANSWER = 43\n")
    (parts / "mine.py").write_text(GOOD.replace("from helper_beside_it", "from parts_of_a_device.answer"))
    assert vars(load_device_class(f"{parts}/mine.py:Mine")())["number"] == 43


def test_a_folder_of_everybodys_is_not_imported_from(folder: Path) -> None:
    """Such as /tmp, for a file in a folder of the user's own there."""
    (folder / "planted_by_another_user.py").write_text("ANSWER = 44\n")
    (folder / "own").mkdir(mode=0o700)
    (folder / "own" / "mine.py").write_text(GOOD.replace("helper_beside_it", "planted_by_another_user"))
    folder.chmod(0o1777)
    with pytest.raises(ConfigError, match="No module named 'planted_by_another_user'"):
        load_device_class(f"{folder}/own/mine.py:Mine")
    assert str(folder) not in sys.path


def test_load(folder: Path) -> None:
    mine = load_device_class(f"{folder}/mine.py:Mine")
    assert issubclass(mine, Device)
    assert mine.name == "mine"
    assert vars(mine())["number"] == 42
    assert load_device_class(f"{folder}/mine.py:Mine") is mine


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("none.py:Mine", "No such file"),
        ("mine.py", "name its class too: .*mine.py:Mine"),
        ("mine.py:Other", "there is no class Other; its devices: Mine, Unfinished"),
        ("mine.py:Record", "not a subclass"),
        ("mine.py:Device", "not a subclass"),
        ("mine.py:Unfinished", "device_id is 0"),
    ],
)
def test_mistakes(folder: Path, driver: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_device_class(f"{folder}/{driver}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\nthere_is_no_such_name\n", "line 2: NameError: name 'there_is_no_such_name'"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_files_that_do_not_import(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ConfigError, match=words) as caught:
        load_device_class(f"{tmp_path}/bad.py:Mine")
    assert caught.value.__cause__ is not None


def test_what_it_imports_is_loaded_with_it(folder: Path) -> None:
    """Also what the command loads late: a sandbox would have none of its shared libraries."""
    (folder / "helper_beside_it.py").write_text("import ssl\nANSWER = 42\n")
    script = f"""
import sys
from vfiouser_virtio import late_modules
late_modules.install()
from vfiouser_virtio.serving.device_files import load_device_class
print("_ssl" in sys.modules)
load_device_class("{folder}/mine.py:Mine")
print("_ssl" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "True"]
