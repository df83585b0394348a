"""Modules that are executed when they are first used."""

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vfiouser_virtio import late_modules

CODE = """
import executions
executions.append(1)
early = 1
import asks_back
late = 2
"""


@pytest.fixture
def executions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """``late_one`` is loaded late, and each time that it is executed, another item is here."""
    (tmp_path / "late_one.py").write_text(CODE)
    (tmp_path / "asks_back.py").write_text(
        "import late_one\nassert late_one.early\nmissing = hasattr(late_one, 'late')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(late_modules, "LATE", frozenset({"late_one"}))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    late_modules.install()
    found: list[int] = []
    counter = ModuleType("executions")
    vars(counter)["append"] = found.append
    monkeypatch.setitem(sys.modules, "executions", counter)
    yield found
    for name in ("late_one", "asks_back"):
        sys.modules.pop(name, None)


def _late_one() -> ModuleType:
    return importlib.import_module("late_one")


def test_it_is_executed_when_a_name_is_asked_for(executions: list[int]) -> None:
    module = _late_one()
    assert _late_one() is module  # which reads its __spec__
    assert not hasattr(module, "__path__")
    assert module.__file__ is not None
    assert not executions
    assert module.late == 2
    assert module.early == 1
    assert executions == [1]
    assert "__getattr__" not in vars(module)


@pytest.mark.parametrize("statement", ["from late_one import late", "from late_one import *; late"])
def test_names_can_be_imported_from_it(executions: list[int], statement: str) -> None:
    exec(statement, {})
    assert executions == [1]


def test_what_it_imports_may_ask_for_its_names(executions: list[int]) -> None:
    """As in any circle of imports, there are those that come before."""
    assert _late_one().late == 2
    assert not importlib.import_module("asks_back").missing
    with pytest.raises(AttributeError, match="module 'late_one' has no attribute 'never'"):
        _ = _late_one().never


def test_a_second_thread_waits_for_all_of_it(
    executions: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    gate = ModuleType("asks_back")
    monkeypatch.setitem(sys.modules, "gate", gate)
    vars(gate).update(begun=begun, go_on=go_on)
    (tmp_path / "asks_back.py").write_text("import gate\ngate.begun.set()\nassert gate.go_on.wait(60)\n")
    module = _late_one()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(module.late)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [2, 2]
    assert executions == [1]


def test_what_failed_is_tried_again(executions: list[int], tmp_path: Path) -> None:
    (tmp_path / "asks_back.py").write_text("raise ImportError('no such library')")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            _ = _late_one().late
    assert executions == [1, 1]


def test_what_a_module_has_imported_can_be_loaded(executions: list[int]) -> None:
    user, other = ModuleType("user"), ModuleType("other")
    vars(user)["renamed"] = module = _late_one()
    late_modules.load_all_of([other])
    assert not executions
    late_modules.load_all_of([other, user])
    late_modules.load_all_of([user])
    assert executions == [1]
    assert vars(module)["late"] == 2
