"""``scripts/fuzz linux-driver``: its cases, and what it makes of their results."""

from pathlib import Path

import pytest
import trio
from evil_matrix.cases import CASES, SUITES, EvilCase, parse_case
from evil_matrix.exercises import EXERCISES
from evil_matrix.fuzz import fuzz, main, what_is_found
from evil_matrix.guest_process import guest_process
from evil_matrix.random_cases import random_case
from evil_matrix.results import CaseResult

from vfiouser_virtio.faults import parse_fault
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device

pytestmark = pytest.mark.once


def result(case: EvilCase, outcome: str, *said: str, neighbour: bool = True, warned: bool = False) -> CaseResult:
    return CaseResult(case.id, "trixie", "6.12", outcome, warned, neighbour, 1, said)


@pytest.mark.parametrize("device", EXERCISES)
def test_cases_are_ones_that_the_devices_have(device: str, tmp_path: Path) -> None:
    EXERCISES[device].expected(tmp_path)
    for number in range(60):
        case = random_case(2007, number, (device,))
        words = [EXERCISES[device].device.format(folder=tmp_path), *([case.options] if case.options else [])]
        [setup] = setups([parse_device(",".join(words + [f"fault={fault}" for fault in case.faults]))])
        setup.create().device.close()
        assert parse_case(case.id) == case


def test_the_seed_decides() -> None:
    first = [random_case(7, number).id for number in range(50)]
    assert first == [random_case(7, number).id for number in range(50)]
    assert first != [random_case(8, number).id for number in range(50)]
    assert len({parse_fault(fault).name for text in first for fault in parse_case(text).faults}) > 30


def test_each_case_of_the_matrix_can_be_replayed() -> None:
    assert [parse_case(case.id).id for case in CASES] == [case.id for case in CASES]
    with pytest.raises(ValueError, match="nonsense: no device type that is exercised; there are blk, "):
        parse_case("nonsense used-twice")


@pytest.mark.parametrize(
    ("outcome", "said", "neighbour", "finding"),
    [
        ("oops", ["BUG: kernel NULL pointer dereference"], False, "the kernel crashes: BUG: kernel NULL pointer"),
        ("refused", ["QEMU ends: closed"], False, "QEMU ends"),
        ("refused", ["Failed to read config space"], True, ""),
        ("error", [], False, "another device of the guest does not work any more"),
        ("hang", [], False, ""),
        ("wrong", ["the disk has read as something else"], True, ""),
    ],
)
def test_what_is_found(outcome: str, said: list[str], neighbour: bool, finding: str) -> None:
    found = what_is_found(result(CASES[0], outcome, *said, neighbour=neighbour), warnings=False)
    assert found.startswith(finding) if finding else not found


def test_warnings_are_found_on_request() -> None:
    warned = result(CASES[0], "error", "WARNING: at x.c:5", warned=True)
    assert not what_is_found(warned, warnings=False)
    assert what_is_found(warned, warnings=True) == "the kernel warns: WARNING: at x.c:5"


async def test_a_finding_is_confirmed_and_made_smaller() -> None:
    """A kernel that crashes of used-twice, elsewhere each time, whatever else there is."""
    ran: list[str] = []

    async def run(case: EvilCase) -> CaseResult | str:
        await trio.lowlevel.checkpoint()
        ran.append(case.id)
        if "used-twice" in case.id:
            return result(case, "oops", f"BUG: at address 0x{len(ran):x}")
        return result(case, "survives") if case.faults else "no fault"

    cases = [parse_case(text) for text in ("blk used-late", "blk used-late used-twice disk-slow", "rng used-twice")]
    said: list[str] = []
    [found] = await fuzz(cases, run, run, warnings=False, until=float("inf"), tell=said.append)
    assert (found["case"], found["of"], found["confirmed"]) == ("blk used-twice", cases[1].id, True)
    assert ran.count(cases[2].id) == 1  # the same once more
    assert "FOUND the kernel crashes: BUG: at address 0x2\n      blk used-twice" in said


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", "nothing used-twice"]) == 2
    assert capsys.readouterr().err.startswith("scripts/fuzz linux-driver: nothing: no device type")


@pytest.mark.qemu
async def test_many_cases_in_one_guest() -> None:
    """A disk that its driver does not take, and then an honest one: it is not touched by what was before."""
    cases = [parse_case(text) for text in ("blk config-value:field=blk_size:value=3", "blk packed=on")]
    ran: list[tuple[str, bool, bool]] = []
    async with guest_process(SUITES[0], 200) as guests:
        with trio.fail_after(900):
            for number, case in enumerate(cases):
                result = await guests.run(case)
                assert isinstance(result, CaseResult), result
                assert guests.behind == tuple(each.id for each in cases[:number])
                ran.append((result.outcome, result.neighbour, result.happened > 0))
    assert ran == [("error", True, True), ("survives", True, False)]


async def test_a_process_that_cannot_work_is_told() -> None:
    async with guest_process("no-such-suite", 1) as guests:
        for _ in range(2):
            assert "no-such-suite" in str(await guests.run(parse_case("blk")))
