"""The fuzzer of PCI devices of one's own: its oracle sees each bug, its cases find one, and good chips pass."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import broken_chips
from support.broken_chips import (
    DoesNotReset,
    GoodChip,
    IgnoresBusMaster,
    LeaksAFile,
    MistakenAuthor,
    NeverRests,
    RaisesInAHook,
    StallsInAHook,
    TakesWhatItIsTold,
)

from vfiouser_virtio.cli import main
from vfiouser_virtio.testing.fuzz import Case, bench, fuzz, generate, pci_driver, run, run_case
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS, PciTarget
from vfiouser_virtio.testing.fuzz.register_map import RegisterMap

pytestmark = pytest.mark.slow

SEED = 2026


def case(*steps: dict[str, Any], memory: Memory = "shared", direct: bool = False) -> Case:
    return Case("requests", "chip", memory, direct=direct, steps=[{"do": "bring_up"}, *steps, {"do": "settle"}])


def put(register: str, value: int) -> dict[str, Any]:
    return {"do": "set", "register": register, "value": value}


SHOWN = [
    (RaisesInAHook, "bug", "IndexError", [put("mode", 0x70)]),
    (TakesWhatItIsTold, "bug", "MemoryError", [put("length", 0xFFFF_FFFF), put("go", 1)]),
    (MistakenAuthor, "bug", "total = 0x100000004: it has 32 bits", [put("go", 5)]),
    (DoesNotReset, "broken", "after a reset total is 0x5, and was 0x0", [put("go", 5)]),
    (NeverRests, "hang", "does not come to rest", [put("command", 1), put("go", 1)]),
    (IgnoresBusMaster, "write", "6c617465, after the device was reset", []),
    (LeaksAFile, "leak", "fds", [put("go", 1)]),
    (StallsInAHook, "stall", "the event loop stood still for", [put("slow", 2)]),
]


@pytest.mark.parametrize(("device", "kind", "words", "steps"), SHOWN, ids=[each[0].__name__ for each in SHOWN])
def test_the_oracle_sees(
    device: type[GoodChip], kind: str, words: str, steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "leak":
        monkeypatch.setattr(bench, "SERVER_TIMEOUT", 0.5)  # what is leaked for good need not be waited for
    if kind == "hang":
        monkeypatch.setattr(pci_driver, "IDLE_TIMEOUT", 0.5)
    found = run_case(case(*steps), PciTarget(device))
    assert found is not None
    assert found.kind == kind, found
    assert words in found.what


@pytest.mark.parametrize("memory", ["shared", "private"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_good_chip_passes_the_same(memory: Memory, direct: bool) -> None:
    steps = [step for *_, steps in SHOWN for step in steps if step["register"] not in ("mode", "slow", "command")]
    steps += [put("serial", 5), put("flash", 0x1234)]  # which a reset does not change
    assert run_case(case(*steps, memory=memory, direct=direct), PciTarget(GoodChip)) is None


def test_nothing_is_found_in_the_chip_with_everything() -> None:
    found = fuzz(SEED, cases=16, kinds=["registers", "requests"], targets=["chip"])
    assert not found, f"{found[0][0].dumps()}\n{found[0][1]}"


def test_the_dictionary_is_what_the_device_declares_and_its_file_names() -> None:
    known = RegisterMap.of(PCI_TARGETS["chip"].make())
    assert known.spots["control"].fields == (1, 2, 0xF0, 1 << 31)
    assert known.spots["channels[1].start"].offset == 0x118
    assert not known.spots["count"].plain, "it has a hook: what it reads as says nothing of what a reset has left"
    assert (8, 8, 4, 4) in known.layouts, "of struct.Struct in its file"
    assert {1 << 16, 0xFFFF_FFFF} <= set(known.words), "of a name in its file, and of the code of its bank"
    assert known.sizes == {0: 0x4000, 2: 0x1000, 4: 0x10}


def test_a_case_is_the_same_each_time_and_names_registers() -> None:
    made = [generate("requests", 1, number, ["chip"]) for number in range(20)]
    assert made == [generate("requests", 1, number, ["chip"]) for number in range(20)]
    assert {"control", "channels[0].start"} <= {step.get("register") for each in made for step in each.steps}


def test_a_bug_is_found_made_small_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "TOLD_AFTER_S", 0.0)
    file = Path(shutil.copy(broken_chips.__file__, tmp_path / "broken.py"))
    out, report = tmp_path / "out", tmp_path / "report.json"
    words = ("fuzz", f"{file}:RaisesInAHook", "--only", "requests", "--seed", "1", "--cases", "128")
    assert main([*words, "--out", str(out), "--report", str(report)]) == 1
    assert capsys.readouterr().err.count("its case is made smaller, for 60 s or so\n") == 1
    [found] = json.loads(report.read_text())["findings"]
    assert found["kind"] == "bug"
    assert "IndexError" in found["what"]
    small = json.loads(Path(found["file"]).read_text())["steps"]
    assert small[-1] | {"value": 0} == {"do": "set", "register": "mode", "value": 0}
    assert main(["fuzz", f"{file}:RaisesInAHook", "--replay", found["file"]]) == 1
    assert main(["fuzz", f"{file}:GoodChip", "--replay", found["file"]]) == 2, "it has no such register"


def test_there_are_no_rings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", f"{broken_chips.__file__}:GoodChip", "--only", "rings", "--cases", "1"]) == 2
    assert "is no virtio device: expected registers or requests" in capsys.readouterr().err
