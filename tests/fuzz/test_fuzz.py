"""The fuzzer as part of the suite: a bounded run with a fixed seed, the corpus, and proof that the oracle sees."""

import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from support.amounts import Amounts

from vfiouser_virtio.audit.packed import PackedWatch
from vfiouser_virtio.audit.split import SplitWatch
from vfiouser_virtio.cli import main
from vfiouser_virtio.cli.fuzz_run import replay_command
from vfiouser_virtio.memory import GuestMemory, Ranges
from vfiouser_virtio.testing.fuzz import (
    TARGETS,
    Case,
    Finding,
    FuzzTarget,
    bench,
    fuzz,
    generate,
    minimize,
    perform,
    run_case,
)
from vfiouser_virtio.testing.fuzz.case import Kind, Memory, Step
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.joined import joined
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS
from vfiouser_virtio.testing.fuzz.run import KINDS
from vfiouser_virtio.testing.fuzz.save import load, save
from vfiouser_virtio.testing.fuzz.targets import Echo
from vfiouser_virtio.virtio import Chain, Queue
from vfiouser_virtio.virtio.guest_ram import GuestRam

pytestmark = pytest.mark.slow

CORPUS = sorted(Path(__file__).with_name("corpus").glob("*.json"))
# Another one than yesterday's finds more than more cases of the same.
SEED = 2007


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind: Kind, amounts: Amounts) -> None:
    found = fuzz(SEED, cases=amounts.fuzz_cases, kinds=[kind])
    assert not found, f"{found[0][0].dumps()}\n{found[0][1]}"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_found_once_is_not_found_again(path: Path) -> None:
    assert run_case(Case.load(path)) is None


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"do": "none"}, "step 0, 'none': there is no such step"),
        ({"do": "sleep"}, "step 0, 'sleep': missing a required argument: 'seconds'"),
        ({"do": "client", "port": 1}, "step 0, 'client': no key 'port'"),
        ({}, "step 0, None: there is no such step"),
    ],
)
def test_a_step_that_is_none_is_no_bug_of_the_stack(
    step: Step, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(Case("rings", "rng").dumps().replace("[\n\n ]", f"[{json.dumps(step)}]"))
    assert main(["fuzz", "self", "--replay", str(path)]) == 2
    assert f"{path}: no case for this target: {said}" in capsys.readouterr().err


def test_an_interrupt_is_none_either() -> None:
    """Ctrl-C was a finding, that was made smaller for a minute."""

    async def interrupted(_: FuzzDriver) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_case(Case("rings", "rng"), FuzzTarget(TARGETS["rng"].make, interrupted, TARGETS["rng"].type))


def test_a_finding_stays_in_its_folder(tmp_path: Path) -> None:
    """The origin is that of a case of another's corpus."""
    case = Case("rings", "rng", origin="rings:1:2/../../../x")
    path = save(case, Finding("bug", "x", "y"), tmp_path / "out")
    assert path.parent == tmp_path / "out"
    assert load(path).origin == case.origin


def test_there_is_a_corpus() -> None:
    assert CORPUS


def test_a_case_is_the_same_each_time_and_survives_json(tmp_path: Path) -> None:
    for kind in KINDS:
        case = generate(kind, 1, 2)
        assert case == generate(kind, 1, 2) != generate(kind, 1, 3)
        path = tmp_path / "case.json"
        path.write_text(case.dumps())
        assert Case.load(path) == case


# The oracle must see what it is there to see: each of these devices has one bug, behind a request that starts with X.


class Broken(Echo):
    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            if chain.readable.read(min(chain.readable.length, 1)) == b"X":
                await self.misbehave(requests, chain)
            chain.complete()

    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        raise NotImplementedError


class Raises(Broken):
    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        raise RuntimeError("what was I thinking")


class AllOfTheRam(GuestRam):
    """What no device is meant to have."""

    def attach(self, memory: GuestMemory, running: Callable[[], bool], rings: Callable[[], Ranges]) -> None:
        super().attach(memory, running, rings)
        self.memory = memory


class WritesBeyond(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.guest_ram = self.ram = AllOfTheRam()

    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        address, length = chain.ranges[-1]
        await self.ram.memory.write(address + length, b"oops")


class Hangs(Broken):
    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        await trio.sleep_forever()


class LeaksAnFd(Broken):
    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        self.leaked = [*getattr(self, "leaked", []), os.dup(0)]

    def close(self) -> None:
        for fd in getattr(self, "leaked", []):
            os.close(fd)


class LeaksATask(Broken):
    async def misbehave(self, requests: Queue, chain: Chain) -> None:
        trio.lowlevel.spawn_system_task(trio.sleep_forever)


class NeverEnds(Echo):
    """Its run is left by nothing: the event loop cannot end."""

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()


async def _works(driver: Any) -> None:
    await driver.request(0, [b"good"], [4])


def _case(memory: Memory = "shared", *, packed: bool = False) -> Case:
    request: dict[str, Any] = {"do": "request", "queue": 0, "out": ["585858"], "room": [8]}
    noise: dict[str, Any] = {"do": "request", "queue": 1, "out": ["00"], "room": [8]}
    steps = [{"do": "bring_up"}, noise, {"do": "settle"}, noise, request, noise, {"do": "settle"}]
    return Case("requests", "echo", memory, offer={"packed": packed}, steps=steps)


@pytest.mark.parametrize(
    ("device", "kind"),
    [(Raises, "bug"), (WritesBeyond, "write"), (Hangs, "hang"), (LeaksAnFd, "leak"), (LeaksATask, "leak")],
)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("memory", ["shared", "private"])
@pytest.mark.diagonal("device", "packed", "memory")
def test_the_oracle_sees(
    device: type[Broken], kind: str, memory: Memory, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "leak":
        monkeypatch.setattr(bench, "SERVER_TIMEOUT", 0.5)  # what is leaked for good need not be waited for
    if kind == "hang":
        monkeypatch.setattr(perform, "BUFFER_TIMEOUT", 0.5)
    for direct in (False, True):
        found = run_case(replace(_case(memory, packed=packed), direct=direct), FuzzTarget(device, _works))
        assert found is not None
        assert found.kind == kind, found


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_oracle_sees_a_bug_in_the_audit(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise IndexError("planted in the watch")

    monkeypatch.setattr(PackedWatch if packed else SplitWatch, "takes", bug)
    case = _case(packed=packed)
    assert run_case(case, FuzzTarget(Echo, _works)) is None
    found = run_case(replace(case, audited=True), FuzzTarget(Echo, _works))
    assert found is not None
    assert found.kind == "bug"
    assert "planted in the watch" in found.what


def test_a_share_of_the_cases_is_audited() -> None:
    made = [generate(kind, SEED, index, ["blk"]) for kind in KINDS for index in range(40)]
    assert {(case.audited, case.direct) for case in made if case.kind == "rings"} == {
        (audited, direct) for audited in (False, True) for direct in (False, True)
    }
    assert sum(case.audited for case in made) == len(made) // 5
    assert not any(generate("registers", SEED, index, list(PCI_TARGETS)).audited for index in range(10))


def test_an_event_loop_that_cannot_end_is_found_and_no_fault_of_the_next_case(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(bench, "STANDSTILL", 1.0)
        found = run_case(_case(), FuzzTarget(NeverEnds, _works))
    assert found is not None
    assert (found.kind, found.where) == ("hang", "event loop")
    for _ in range(3):
        assert run_case(_case(), TARGETS["echo"]) is None
        gc.collect()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_good_device_passes_the_same_case(packed: bool) -> None:
    assert run_case(_case(packed=packed), TARGETS["echo"]) is None


def test_a_finding_is_minimized() -> None:
    target = FuzzTarget(Raises, _works)
    finding = run_case(_case(), target)
    assert isinstance(finding, Finding)
    small = minimize(_case(), finding, target)
    assert [step["do"] for step in small.steps] == ["bring_up", "request"]
    assert small.steps[1]["out"] == ["585858"]


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (Raises, "bug"), (WritesBeyond, "write"), (Hangs, "hang"), (LeaksAnFd, "leak"), (LeaksATask, "leak"),
        (NeverEnds, "hang"),
    ],
)  # fmt: skip
def test_each_kind_of_finding_is_replayed_from_its_file(
    device: type[Echo], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two clients, one after the other."""
    case = joined([_case(), _case("private")])
    with monkeypatch.context() as impatient:
        impatient.setattr(bench, "SERVER_TIMEOUT", 0.5)
        impatient.setattr(bench, "STANDSTILL", 1.0 if device is NeverEnds else bench.STANDSTILL)
        impatient.setattr(perform, "BUFFER_TIMEOUT", 0.5)
        impatient.setitem(TARGETS, "echo", FuzzTarget(device, _works))
        finding = run_case(case)
        assert finding is not None
        path = save(minimize(case, finding, seconds=1), finding, tmp_path)
        words = shlex.split(replay_command(["self"], path))
        assert main(words[1:]) == 1
    assert capsys.readouterr().out.startswith(f"{path}: {kind}: ")
    monkeypatch.setitem(TARGETS, "echo", FuzzTarget(Echo, _works))
    assert main(words[1:]) == 0
    gc.collect()


def test_a_race_is_replayed_until_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    class RaisesAtTimes(Raises):
        async def misbehave(self, requests: Queue, chain: Chain) -> None:
            runs.append(1)
            if len(runs) == 3:
                raise RuntimeError("three is a race")

    monkeypatch.setitem(TARGETS, "echo", FuzzTarget(RaisesAtTimes, _works))
    path = save(_case(), Finding("bug", "three is a race", "here"), tmp_path)
    assert main(["fuzz", "self", "--replay", str(path)]) == 1
    assert len(runs) == 3
    assert main(["fuzz", "self", "--replay", str(path)]) == 0
    assert len(runs) == 6


def test_the_generated_cases_find_a_broken_device() -> None:
    class Breaks(Raises):
        async def _serve(self, requests: Queue) -> None:
            async for chain in requests:
                if chain.readable.read(min(chain.readable.length, 1)) == b"S":
                    await self.misbehave(requests, chain)
                chain.complete()

    async def works(driver: Any) -> None:
        await driver.request(0, [b"good"], [4])

    [(case, finding)] = fuzz(SEED, cases=20, kinds=["requests"], targets=["echo"], target=FuzzTarget(Breaks, works))
    assert finding.kind == "bug"
    assert "RuntimeError" in finding.what
    assert case.origin.startswith(f"requests:{SEED}:")


def test_the_first_interrupt_of_a_process_is_no_leak() -> None:
    """In a process of its own: what is opened then is kept, and shared by all devices."""
    program = """
import os, trio
from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.testing.fuzz.oracle import Resources

async def main():
    fd = os.eventfd(0)
    before = Resources.now()
    signal(fd)
    before.check("after an interrupt")

trio.run(main)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
