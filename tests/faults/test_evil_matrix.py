"""``scripts/evil-matrix``: verdicts from what guests have said, its table in docs/evil.md, and one case in a guest."""

from pathlib import Path

import pytest
import trio
from evil_matrix import results, table
from evil_matrix.__main__ import main
from evil_matrix.cases import CASES, SUITES
from evil_matrix.classify import NO_ANSWER, Outcome, Seen, classify, where
from evil_matrix.exercises import EXERCISES, WRONG
from evil_matrix.results import CaseResult
from evil_matrix.run_all import run_one

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FAULTS
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device

pytestmark = pytest.mark.once

# ---- verdicts --------------------------------------------------------------------------------------------------------

_IO_ERROR = (
    "<3>[    7.352710] virtio_blk virtio1: req.0:id 0 is not a head!\n<3>[    7.36] I/O error, dev vda, sector 0\n"
)
_OOPS = """\
<1>[   12.012345] BUG: kernel NULL pointer dereference, address: 0000000000000010
<4>[   12.012512] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI
<4>[   12.012601] CPU: 1 UID: 0 PID: 93 Comm: modprobe Not tainted 6.12.117+deb13-cloud-amd64 #1
<4>[   12.012733] RIP: 0010:virtnet_probe+0x2f1/0xd00 [virtio_net]
<4>[   12.013733] Call Trace:
<4>[   12.014733]  virtio_dev_probe+0x1e4/0x2a0
<4>[   12.014734]  ? pm_runtime_barrier+0x54/0x90
<4>[   12.014735]  </TASK>
"""
# Of Linux 6.12 whose console had used-len-short; shortened.
_WARNING = """\
<4>[    4.033602] ------------[ cut here ]------------
<4>[    4.033806] WARNING: CPU: 1 PID: 44 at mm/page_alloc.c:4832 __alloc_pages_noprof+0x2a7/0x310
<4>[    4.034068] Modules linked in: virtio_rng
<4>[    4.037612] RIP: 0010:__alloc_pages_noprof+0x2a7/0x310
<4>[    4.041022] Call Trace:
<4>[    4.041646]  <TASK>
<4>[    4.042201]  ___kmalloc_large_node+0x87/0xa0
<4>[    4.044741]  control_work_handler+0x20d/0x4d0
<4>[    4.044769]  process_one_work+0x188/0x340
<4>[    4.044944]  </TASK>
<4>[    4.045015] ---[ end trace 0000000000000000 ]---
<3>[    4.045282] virtio-ports vport1p0: Not enough space to store port name
"""
_NEW_WARNING = (
    "<4>[   12.012345] WARNING: drivers/virtio/virtio_ring.c:123 at virtqueue_add+0x2f1/0xd00, CPU#1: dd/93\n"
)
_LOCKUP = "<0>[   40.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [modprobe:93]\n"
# Of Linux 6.12 whose disk had reset-stuck, or generation-moves; shortened.
_STUCK = """\
== sh
[<0>] do_wait+0x60/0x110
[<0>] kernel_wait4+0xb7/0x160
[<0>] __do_sys_wait4+0x9d/0xb0
[<0>] do_syscall_64+0x87/0x180
== sh
[<0>] msleep+0x2b/0x40
[<0>] vp_reset+0x2b/0x80
[<0>] virtblk_remove+0x43/0x80 [virtio_blk]
[<0>] virtio_dev_remove+0x3e/0x90
[<0>] device_release_driver_internal+0x16b/0x210
== modprobe
== a CPU
[   25.618615]  dump_stack_lvl+0x5d/0x80
[   25.618804]  write_sysrq_trigger+0x59/0x80
== a CPU
[   29.823871] RIP: 0010:ioread32+0x34/0x60
[   29.832799]  vp_get+0x6d/0xb0
[   29.834504]  ? pm_runtime_barrier+0x54/0x90
[   29.833528]  virtblk_update_capacity+0xa1/0x130 [virtio_blk]
== a CPU
[   25.628409] RIP: 0010:pv_native_safe_halt+0xf/0x20
[   25.637605]  default_idle+0x9/0x20
"""


@pytest.mark.parametrize(
    ("seen", "outcome", "warned", "said"),
    [
        (Seen(0), Outcome.SURVIVES, False, []),
        (Seen(0, kernel=_IO_ERROR), Outcome.SURVIVES, False, ["virtio_blk virtio1: req.0:id 0 is not a head!"]),
        (
            Seen(0, kernel="<4>[ 1.0] hrtimer: interrupt took 14979499 ns\n<6>[ 1.1] fine\n"),
            Outcome.SURVIVES,
            False,
            [],
        ),
        (Seen(1, "8+0 records in\nno disk\n"), Outcome.ERROR, False, ["no disk"]),
        (Seen(1, "bad\n", _IO_ERROR), Outcome.ERROR, False, ["virtio_blk virtio1: req.0:id 0 is not a head!"]),
        (Seen(WRONG, "it is something else\n"), Outcome.WRONG, False, ["it is something else"]),
        (Seen(None, stuck=_STUCK), Outcome.HANG, False, ["sh: vp_reset < virtblk_remove < virtio_dev_remove"]),
        (Seen(None, kernel=_LOCKUP, stuck=_STUCK), Outcome.HANG, False, [_LOCKUP[12:].strip()]),
        (
            Seen(0, kernel=_WARNING),
            Outcome.SURVIVES,
            True,
            [_WARNING.splitlines()[1][18:], "in control_work_handler < process_one_work", "virtio-ports vport1p0"],
        ),
        (Seen(0, kernel=_NEW_WARNING), Outcome.SURVIVES, True, [_NEW_WARNING[18:].strip()]),
        (Seen(1, "no disk", _WARNING + _OOPS), Outcome.OOPS, True, [_OOPS.splitlines()[0][18:], "in virtnet_probe"]),
        (Seen(None, kernel=_OOPS, stuck=_STUCK), Outcome.OOPS, False, [_OOPS.splitlines()[0][18:], "in virtnet_probe"]),
        (Seen(None, kernel="[    3.1] Kernel panic - not syncing: x\n"), Outcome.OOPS, False, ["Kernel panic - not"]),
        (Seen(0, kernel="<3>[ 1.0][ T42] BUG: KASAN: slab-out-of-bounds in f\n"), Outcome.OOPS, False, ["BUG: KASAN"]),
    ],
)
def test_verdicts(seen: Seen, outcome: Outcome, warned: bool, said: list[str]) -> None:
    verdict = classify(seen)
    assert (verdict.outcome, verdict.warned) == (outcome, warned)
    assert [line[: len(begins)] for line, begins in zip(verdict.said, said, strict=False)] == said
    assert bool(verdict.said) is bool(said)


def test_where_it_hangs() -> None:
    assert where(_STUCK) == ["sh: vp_reset < virtblk_remove < virtio_dev_remove"]
    assert where(f"== {NO_ANSWER}\n") == [NO_ANSWER]
    running = _STUCK[_STUCK.index("== modprobe") :]
    assert where(running) == ["a CPU: ioread32 < vp_get < virtblk_update_capacity"]


# ---- cases, results, the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", EXERCISES)
def test_cases_are_ones_that_the_devices_have(device: str, tmp_path: Path) -> None:
    exercise = EXERCISES[device]
    exercise.expected(tmp_path)
    for case in CASES:
        if case.device == device:
            words = [exercise.device.format(folder=tmp_path), *([case.options] if case.options else [])]
            spec = ",".join(words + [f"fault={fault}" for fault in case.faults])
            [setup] = setups([parse_device(spec)])
            try:
                setup.create().device.close()
            except ConfigError as error:
                raise AssertionError(f"{case.id}: {error}") from None


def test_each_fault_has_a_row_in_the_document() -> None:
    missing = FAULTS.keys() - {case.fault for case in CASES}
    assert not missing, f"add a case of {', '.join(sorted(missing))} to scripts/evil_matrix/cases.py"
    known = results.read()
    unknown = [case for case in CASES if any((case.id, suite) not in known for suite in SUITES)]
    commands = " && ".join(
        [*(f"scripts/evil-matrix --only '{case.id}'" for case in unknown), "scripts/evil-matrix --write"]
    )
    assert not unknown, f"run {commands}"
    assert table.section(known) in table.DOCUMENT.read_text(), "run scripts/evil-matrix --write"


def test_honest_devices_survive() -> None:
    found = [
        result for result in results.read().values() if result.case in {case.id for case in CASES if not case.faults}
    ]
    assert {(result.outcome, result.neighbour) for result in found} == {("survives", True)}


def made(case: str, outcome: Outcome = Outcome.HANG, **more: object) -> CaseResult:
    values = {"warned": False, "neighbour": True, "happened": 1, "said": ("a|b `c`",), **more}
    return CaseResult(case, SUITES[0], "6.12.1", outcome.value, **values)  # type: ignore[arg-type] # of a test


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert results.read(path) == {}
    first, later, other = made("blk used-late"), made("blk used-late", Outcome.SURVIVES), made("blk gone")
    for result in (other, first, later):
        results.append(result, path)
    assert list(results.read(path).values()) == [other, later]
    results.tidy([first.key, made("blk unknown").key], path)
    assert results.read(path) == {later.key: later}
    assert path.read_text().count("\n") == 1


def test_the_table() -> None:
    case = next(each for each in CASES if each.fault == "packed-gap")
    known = {result.key: result for result in [made(case.id, warned=True, neighbour=False)]}
    lines = table.markdown(known, [case], SUITES).splitlines()
    assert lines[0] == "| kernel | survives | error | wrong | hang | oops | refused | of them with a warning |"
    assert lines[2] == "| Linux 6.12.1 | 0 | 0 | 0 | 1 | 0 | 0 | 1 |"
    assert lines[-1] == "| `packed-gap:at=20` (`packed=on`) | **hang, warn, neighbour too** |  | `a/b 'c'` |"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    for result in (made(case.id, Outcome.ERROR) for case in CASES):
        results.append(result, path)
    assert main(["--list", "--only", "used-never", "--only", "input", "--results", str(path)]) == 0
    assert "net used-never:queue=0:at=20 " in (listed := capsys.readouterr().out)
    assert {line.split()[-3:][0] for line in listed.splitlines()} == {"error"}
    # What is there is not run again: there is nothing to do.
    assert main(["--kernel", SUITES[0], "--only", "used-never", "--results", str(path), "--list"]) == 0
    assert main(["--only", "used-nver"]) == 2
    path.write_text("{}\n")
    assert main(["--list", "--results", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "scripts/evil-matrix: --only used-nver: there is no such case; --list shows all"
    assert len(said) == 2


# ---- in a guest ------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
async def test_one_case_in_a_guest() -> None:
    case = next(each for each in CASES if each.id == "blk used-twice:at=20")
    with trio.fail_after(600):
        result = await run_one(case, SUITES[0], seconds=60)
    assert isinstance(result, CaseResult), result
    # Linux gives the queue up: requests from then on fail, and one that was under way just then is waited for.
    assert result.outcome in ("error", "hang")
    assert (result.warned, result.neighbour, result.happened) == (False, True, 1)
    assert "is not a head!" in result.said[0]
