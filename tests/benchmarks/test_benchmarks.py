"""Every benchmark runs, and measures what it says: a short run, and no look at how fast it was."""

import json
import shutil
from collections.abc import Sequence

import pytest
from benchmarks import (
    engines,
    first_request,
    guest_io,
    isolation,
    net,
    net_rings,
    own_pci,
    processes,
    registers,
    requests,
    rings,
    scaling,
    stall,
    startup,
    steps,
    supervision,
)
from benchmarks.measure import Options, Row
from benchmarks.server import served
from support.libvfio_user_found import find

from vfiouser_virtio.serving.qemu_command import qemu_device

pytestmark = pytest.mark.once

SHORT = Options(rounds=1, quick=True)


def check(rows: Sequence[Row], *contenders: str) -> dict[str, Row]:
    """Each metric once, with figures that can be true, and with targets only for contenders that there are."""
    found = {row.metric: row for row in rows}
    assert len(found) == len(rows)
    for row in rows:
        for figures in (row.ours, *row.theirs.values()):
            assert len(figures) == len(row.ours)
            assert all(figure >= 0 for figure in figures)
    assert {name for row in rows for name in row.theirs} == set(contenders)
    return found


@pytest.mark.slow
def test_startup() -> None:
    rows = check(startup.run(SHORT), "python -c pass", "python -c 'import trio'", "1 device")
    # In milliseconds: no Python starts in one, and no server in ten. (They are not compared: each may have to wait.)
    start = rows["start to ready"]
    assert min(start.theirs["python -c pass"]) > 1
    assert min(start.ours) > 10
    assert rows["memory, 1 device"].ours[0] > 10
    assert "CPU of 10 idle devices" in rows


def test_first_request_and_stall() -> None:
    assert set(check(first_request.run(SHORT))) == set(first_request.LIMITS_MS)
    check(stall.run(SHORT), "idle")


@pytest.mark.parametrize("compiler", [True, False])
def test_rings(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler and not shutil.which("cc"):
        pytest.skip("no C compiler")
    if not compiler:
        monkeypatch.setattr("benchmarks.compiler.shutil.which", lambda name: None)
    notes: list[str] = []
    rows = rings.run(Options(rounds=1, quick=True, note=notes.append))
    found = {row.metric: row for row in rows}
    assert len(found) == len(rows) == 2 * (3 * 3 + 1)
    assert sum(bool(row.targets) for row in rows) == len(rings.TARGETS)
    for row in rows:
        assert set(row.theirs) == ({"C loop"} if compiler and "no EVENT_IDX" not in row.metric else set())
        # In millions a second: nothing in Python is as fast as this. (C may have to wait, so it is no measure.)
        assert 0 < row.ours[0] < 100
        assert all(figures[0] > 0 for figures in row.theirs.values())
    assert len(notes) == (not compiler)


def test_steps() -> None:
    rows = check(steps.run(SHORT))
    assert {"interrupt by eventfd", "DMA map and unmap", "block read, 64 at once"} <= rows.keys()
    assert all(row.ours[0] > 0 for row in rows.values())


def test_own_pci() -> None:
    rows = check(own_pci.run(SHORT), "bare callback")
    assert {"register read", "hook", "DMA read of 4 KiB, mapped"} <= rows.keys()
    assert all(row.ours[0] > 0 for row in rows.values())


def test_net_rings() -> None:
    rows = check(net_rings.rows(SHORT))
    assert [row.metric for row in rows.values() if row.targets] == [net_rings.THROUGH_HUB]
    assert all(row.ours[0] > 0 for row in rows.values())


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.variant
def test_net_in_guests() -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    rows = check(net.run(Options(rounds=1, quick=True, only="^guest to guest: (TCP in|64.*out|round)")), "QEMU, stream")
    assert len(rows) == 2 + 2 + 3
    assert sum(bool(row.targets) for row in rows.values()) == 3
    assert all(row.ours[0] > 0 for row in rows.values())


def test_net_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compiler.shutil.which", lambda name: None)
    notes: list[str] = []
    assert net.run(Options(rounds=1, quick=True, only="^tap", note=notes.append)) == []
    assert notes == ["no C compiler: there is no load for guests"]


@pytest.mark.parametrize("compiler", [True, False])
def test_registers(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler and not shutil.which("cc"):
        pytest.skip("no C compiler")
    if not compiler:
        monkeypatch.setattr("benchmarks.compiler.shutil.which", lambda name: None)
    notes: list[str] = []
    rows = registers.run(Options(rounds=1, quick=True, note=notes.append))
    found = check(rows, *(["C echo"] if compiler else []))
    assert found["posted write, two CPUs"].ours[0] > 0
    assert len(notes) == (1 if compiler else 2)


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=pytest.mark.variant), False])
def test_requests(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler and not shutil.which("cc"):
        pytest.skip("no C compiler")
    if not compiler:
        monkeypatch.setattr("benchmarks.compiler.shutil.which", lambda name: None)
    notes: list[str] = []
    rows = requests.run(Options(rounds=1, quick=True, only="4 KiB QD|cache, 512 B QD1", note=notes.append))
    assert len(notes) == 1
    if not compiler:
        assert rows == []
        return
    found = check(rows, "C loop", "Python loop")
    loads = {f"{disk}, 4 KiB QD{depth}" for disk in requests.DISKS for depth in (1, 32)}
    assert found.keys() == {
        *loads,
        *(f"{load}: CPU per request" for load in loads),
        f"{requests.CACHED}, 512 B QD1",
    }
    assert all(figures[0] > 0 for row in rows for figures in (row.ours, *row.theirs.values()))
    assert sum(bool(row.targets) for row in rows) == len(requests.TARGETS)


@pytest.mark.slow
@pytest.mark.variant
def test_scaling_and_processes() -> None:
    rows = check(scaling.run(SHORT), *(next(iter(series)) for series in scaling.SERIES))
    assert rows["size: 256 KiB"].ours[0] > 1
    check(processes.run(SHORT), "in one process", "apart, other idle")


@pytest.mark.variant
def test_supervision() -> None:
    rows = check(supervision.run(SHORT), "--processes")
    assert len(rows) == 4


@pytest.mark.variant
def test_isolation() -> None:
    some = "^(notifications|writes in|128 reads of 1 MiB, cold|malformed|longest chains, packed$|maps and)"
    rows = check(isolation.run(Options(rounds=1, quick=True, only=some)), "idle")
    assert len(rows) == 5 * 6
    assert sum(bool(row.targets) for row in rows.values()) == 3 * 6


@pytest.mark.qemu
@pytest.mark.slow
def test_engines() -> None:
    if find()[0] is None:
        pytest.skip(find()[1])
    rows = check(engines.run(Options(rounds=1, quick=True, only="randread 4 KiB QD32")), engines.THEIRS)
    assert {"read, same CPU", "randread 4 KiB QD32", "server CPU per request, geometric mean"} <= rows.keys()
    assert not any(comparison.target for row in rows.values() for comparison in row.comparisons)


def test_engines_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBVFIO_USER", "/nonexistent.so")
    notes: list[str] = []
    assert engines.run(Options(rounds=1, quick=True, note=notes.append)) == []
    assert notes == ["libvfio-user: there is no /nonexistent.so"]


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.variant
def test_guest_io_with_a_variant_and_a_peer() -> None:
    notes: list[str] = []
    with served("blk,size=16M") as (path,):
        options = Options(
            rounds=1,
            quick=True,
            only="randread 4 KiB QD32|randwrite 4 KiB QD1|console",
            variants=["packed=off"],
            peers=[json.dumps(qemu_device("another", path))],
            note=notes.append,
        )
        rows = check(guest_io.run(options), "built-in", "vhost-user-blk", "ours packed=off", "peer 1")
    assert all(row.ours[0] > 0 for row in rows.values())
    assert set(rows["console output"].theirs) == {"built-in"}
    assert set(rows["randread 4 KiB QD32"].targets) == {"built-in", "vhost-user-blk"}
    assert len(rows) == 2 + 2 + 1 + 1
    assert notes == [f"peer 1 is {options.peers[0]}"]
