"""Parsers that are fuzzed alone: what is planted in them is found, made small, and replayed; else nothing is found.

A long file, since each fault that is planted is a few lines beside the table that says what it is found as.
"""

import json
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vfiouser_virtio.cli import main
from vfiouser_virtio.devices import blk_requests, net_commands
from vfiouser_virtio.devices.blk_requests import Planner
from vfiouser_virtio.devices.net_control import Control
from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.pci import ConfigSpace
from vfiouser_virtio.pci.bars import Bars
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.jobs import run_jobs
from vfiouser_virtio.testing.fuzz.parsers import message_bench, run
from vfiouser_virtio.testing.fuzz.parsers.rings import Rings
from vfiouser_virtio.testing.fuzz.parsers.run import PARSERS, ParserRun, fuzz_parsers, parser_case, run_parser_case
from vfiouser_virtio.testing.fuzz.report import Discovery, FuzzReport
from vfiouser_virtio.vfio_device import VfioDevice
from vfiouser_virtio.vfio_user.server.dispatch import Response, dispatch
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Connection, Message
from vfiouser_virtio.vring import Chain, PackedRing, Ring, RingState, SplitRing, packed, split

SEED = 7
ENOUGH = 3 * 1024
"""Cases in which each planted fault is found, several times."""


def ran(name: str, out: Path, *, cases: int = ENOUGH, jobs: int = 1, stop: int = 1) -> FuzzReport:
    report = FuzzReport("parsers", SEED)
    options = ParserRun(SEED, (name,), out)
    run_jobs(fuzz_parsers, options, report, cases=cases, seconds=None, jobs=jobs, stop=stop, on_found=lambda _: None)
    return report


def found(name: str, out: Path) -> Discovery:
    """The first finding, which its file shows again."""
    [discovery] = ran(name, out).discoveries
    assert not discovery.finding.once
    again = run_parser_case(Case.load(Path(discovery.path)))
    assert again is not None
    assert again.key == discovery.key
    return discovery


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    report = ran(name, tmp_path, cases=2000)
    assert report.discoveries == [], report.discoveries[0].finding
    assert (report.cases, report.notes) == (2000, {name: 2000})


# ---- rings -----------------------------------------------------------------------------------------------------------


class TakesInFlight(SplitRing):
    """A head that is in flight is taken again."""

    def _refuse(self, head: int) -> None:
        if head >= self.size:
            super()._refuse(head)


class LosesTheLast(SplitRing):
    def pop(self, limit: int, memory: Any = None) -> list[Chain]:
        return super().pop(limit, memory)[:-1]


class Raises(SplitRing):
    def _descriptors(self, head: int, memory: Any) -> Any:
        found = super()._descriptors(head, memory)
        if len(found) > 4:
            raise KeyError(head)
        return found


class Loops(SplitRing):
    def _descriptors(self, head: int, memory: Any) -> Any:
        found = super()._descriptors(head, memory)
        while len(found) > 4:
            pass
        return found


class StoresElsewhere(SplitRing):
    """The used element behind the one that is meant is overwritten, too."""

    def _store(self, used: list[int]) -> None:
        super()._store(used)
        if self.size > 2:
            self.parts[2][4 + 8 * (self.used_idx % self.size)] ^= 1


class NeverInterrupts(SplitRing):
    def interrupt_due(self) -> bool:
        return super().interrupt_due() and False


class SaysThatNothingIsThere(PackedRing):
    def request_notification(self) -> bool:
        return super().request_notification() and False


class ForgetsToUndo(PackedRing):
    def undo_pop(self, chain: Chain) -> bool:
        return self._order is None


class ForgetsWhatIsInFlight(PackedRing):
    def restore(self, state: RingState) -> None:
        super().restore(state._replace(buffers=state.buffers[1:]))


class MarksAsWritten(PackedRing):
    """A used descriptor always says that something was written."""

    def _store(self, used: list[int]) -> None:
        position = self.next_used % self.size
        super()._store(used)
        self.parts[0][16 * position + 14] |= 2


class ReadsInAnotherOrder(PackedRing):
    """The views of what is to be read are not in the order of the descriptors, though the ranges are."""

    def pop(self, limit: int, memory: Any = None) -> list[Chain]:
        chains = super().pop(limit, memory)
        for chain in chains:
            part = chain.readable
            part.segments = list(part.segments)[::-1]
        return chains


class WritesInAnotherOrder(PackedRing):
    def pop(self, limit: int, memory: Any = None) -> list[Chain]:
        chains = super().pop(limit, memory)
        for chain in chains:
            part = chain.writable
            part.segments = list(part.segments)[::-1]
        return chains


class LetsWriteWhatIsReadable(SplitRing):
    def pop(self, limit: int, memory: Any = None) -> list[Chain]:
        chains = super().pop(limit, memory)
        for chain in chains:
            chain.readable.segments = [
                view
                for address, length in chain.ranges[: chain.writable_from]
                if length
                for view in self.memory.writable(address, length)
            ]
        return chains


RING_FAULTS: list[tuple[type[Ring], str, str]] = [
    (TakesInFlight, "differs", "pop takes more"),
    (LosesTheLast, "differs", "pop takes less"),
    (Raises, "bug", "KeyError in split.py:pop"),
    (StoresElsewhere, "write", "device"),
    (NeverInterrupts, "differs", "interrupt_due"),
    (SaysThatNothingIsThere, "differs", "request_notification"),
    (ForgetsToUndo, "differs", "request_notification"),
    (ForgetsWhatIsInFlight, "differs", "restore"),
    (MarksAsWritten, "write", "desc"),
    (ReadsInAnotherOrder, "differs", "header"),
    (WritesInAnotherOrder, "write", "buffers"),
    (LetsWriteWhatIsReadable, "differs", "writable views of what is to be read"),
]


@pytest.mark.parametrize(("ring", "kind", "where"), RING_FAULTS)
def test_what_is_wrong_with_a_ring_is_found(
    ring: type[Ring], kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "packed" if issubclass(ring, PackedRing) else "split"
    with monkeypatch.context() as planted:
        planted.setitem(PARSERS, name, partial(Rings, packed=name == "packed", ring=ring))
        discovery = found(name, tmp_path)
    case = Case.load(Path(discovery.path))
    assert discovery.key == (kind, where)
    assert len(case.steps) <= 8  # the ring, its memory, a few stores and looks
    assert run_parser_case(case) is None


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).with_name("parser_corpus").glob("*.json")), ids=lambda path: path.stem
)
def test_what_was_found_is_not_found_again(path: Path) -> None:
    assert run_parser_case(Case.load(path)) is None


@pytest.mark.parametrize(("name", "module"), [("split", split), ("packed", packed)])
def test_a_look_without_an_end_is_found(
    name: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POP_BUDGET", 1 << 30)
    [discovery] = ran(name, tmp_path, cases=60_000).discoveries
    assert discovery.key == ("differs", "budget")


def test_a_ring_that_does_not_come_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HANG_S", 0.1)
    monkeypatch.setattr(run, "MINIMIZE_S", 1.0)
    monkeypatch.setitem(PARSERS, "split", partial(Rings, packed=False, ring=Loops))
    assert found("split", tmp_path).key == ("hang", "event loop")


# ---- messages --------------------------------------------------------------------------------------------------------

GOOD_DISPATCH = dispatch


def forgets_descriptors(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    if message.command == 13:
        message.take_fds()
    return GOOD_DISPATCH(device, message, negotiated)


def answers_with_a_byte_more(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    answer = GOOD_DISPATCH(device, message, negotiated)
    return answer._replace(payload=answer.payload + b"!") if message.command == 7 else answer


def asks_twice(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    if message.command == 3:
        GOOD_DISPATCH(device, message, negotiated)
    return GOOD_DISPATCH(device, message, negotiated)


def raises(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    if message.command == 8 and len(message.body) < 20:
        raise KeyError(message.command)
    return GOOD_DISPATCH(device, message, negotiated)


def ends_the_connection(device: VfioDevice, message: Message, negotiated: Negotiated) -> Response:
    if message.command > 18:
        raise PeerError("unknown", fatal=True)
    return GOOD_DISPATCH(device, message, negotiated)


MESSAGE_FAULTS: list[tuple[Any, str, str]] = [
    (forgets_descriptors, "leak", "fds"),
    (answers_with_a_byte_more, "differs", "replies"),
    (asks_twice, "differs", "calls"),
    (raises, "differs", "replies"),
    (ends_the_connection, "differs", "end"),
]


@pytest.mark.parametrize(("broken", "kind", "where"), MESSAGE_FAULTS)
def test_what_is_wrong_with_an_answer_is_found(
    broken: Any, kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(message_bench, "dispatch", broken)
        discovery = found("messages", tmp_path)
    assert discovery.key == (kind, where)
    case = Case.load(Path(discovery.path))
    assert len(case.steps) <= 2  # one message, perhaps in two pieces
    assert run_parser_case(case) is None


def test_a_frame_that_is_no_frame_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Connection.next

    def takes_any_size(connection: Connection) -> bool:
        try:
            return good(connection)
        except PeerError:
            return False

    monkeypatch.setattr(Connection, "next", takes_any_size)
    assert found("messages", tmp_path).key == ("differs", "end")


def test_a_codec_that_is_not_as_its_schema_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_bench, "HEADER_CODEC", struct.Struct("<HHiII"))
    assert found("messages", tmp_path).key == ("differs", "construct HEADER")


# ---- requests, commands, and accesses of a function ----------------------------------------------------------------


def everywhere(_planner: Planner, sector: int, _length: int) -> int:
    return sector % 16 * 512


def counts_the_status(chain: Chain, status: int, filled: int = 0) -> None:
    GOOD_FINISH(chain, status, filled)
    assert isinstance(chain.head, int)
    LAST_RING.completed[-1] = filled + 1


class LastRing:
    completed: list[int]


LAST_RING = LastRing()
GOOD_FINISH, GOOD_TAKE = Chain.finish_request, Chain.take_request


def remembers_its_ring(chain: Chain, header: struct.Struct) -> Any:
    assert chain.ring is not None
    LAST_RING.completed = chain.ring.completed
    return GOOD_TAKE(chain, header)


def stores_all(config: ConfigSpace, offset: int, data: Any) -> None:
    config.read(offset, len(data))
    config.store(offset, bytes(data))


def always_decodes(bars: Bars, *, memory: bool, io: bool) -> None:
    GOOD_DECODE(bars, memory=memory or io, io=io or memory)


def pads(config: ConfigSpace, offset: int, count: int) -> bytes:
    return GOOD_READ(config, offset, min(count, max(config.size - offset, 0))).ljust(count, b"\0")


def says_more(control: Control, request: bytes, room: int) -> bytes:
    return (GOOD_PERFORM(control, request, room) + b"\0")[: room + 1]


GOOD_PERFORM = Control.perform
GOOD_DECODE, GOOD_READ = Bars.set_decode, ConfigSpace.read


@pytest.mark.parametrize(
    ("name", "planted", "kind", "where"),
    [
        ("blk", [(Planner, "offset", everywhere)], "differs", "disk"),
        ("blk", [(blk_requests, "MAX_DISCARD_SEGMENTS", 17)], "write", "guest memory"),  # another status
        (
            "blk",
            [(Chain, "take_request", remembers_its_ring), (Chain, "finish_request", counts_the_status)],
            "differs",
            "used",
        ),
        ("config", [(ConfigSpace, "write", stores_all)], "differs", "config"),
        ("config", [(Bars, "set_decode", always_decodes)], "differs", "read"),
        ("config", [(ConfigSpace, "read", pads)], "differs", "not refused"),
        ("control", [(net_commands, "MAX_VLAN", 1 << 16)], "differs", "told"),
        ("control", [(net_commands, "MAX_KEY", 64)], "differs", "told"),
        ("control", [(Control, "perform", says_more)], "differs", "answer"),
    ],
)
def test_what_is_wrong_behind_requests_and_accesses_is_found(
    name: str,
    planted: list[tuple[Any, str, Any]],
    kind: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        for owner, attribute, value in planted:
            patch.setattr(owner, attribute, value)
        discovery = found(name, tmp_path)
    assert discovery.key == (kind, where)
    case = Case.load(Path(discovery.path))
    assert len(case.steps) <= 5
    assert run_parser_case(case) is None


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARSERS)
def test_a_case_is_the_same_by_its_number_and_in_a_file(name: str, tmp_path: Path) -> None:
    for number in (0, 1, 1023, 1024, 2500):
        case = parser_case(f"{name}:{SEED}:{number}")
        assert case is not None
        assert case == parser_case(f"{name}:{SEED}:{number}") != parser_case(f"{name}:{SEED}:{number + 1}")
        path = tmp_path / "case.json"
        path.write_text(case.dumps())
        assert Case.load(path) == case
        assert run_parser_case(case) is None


def test_the_number_of_a_finding_is_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARSERS, "packed", partial(Rings, packed=True, ring=MarksAsWritten))
    for discovery in ran("packed", tmp_path, stop=3).discoveries:
        case = parser_case(discovery.origin)
        assert case is not None
        again = run_parser_case(case)
        assert again is not None
        assert again.key == discovery.key


def test_jobs_share_the_cases(tmp_path: Path) -> None:
    report = ran("messages", tmp_path, cases=2500, jobs=2)
    assert (report.cases, report.notes, report.discoveries) == (2500, {"messages": 2500}, [])


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"do": "pop", "limit": 1}], "first step must be a ring"),
        ([{"do": "ring"}], "missing"),
        (None, "all of its parameters"),
    ],
)
def test_what_is_no_case_is_refused(steps: list[Any] | None, said: str) -> None:
    if steps is None:
        case = parser_case("split:1:1")
        assert case is not None
        steps = [case.steps[0], {"do": "pop"}]
    with pytest.raises((ValueError, TypeError), match=said):
        run_parser_case(Case("parser", "split", steps=steps))


def test_an_unknown_parser_is_refused() -> None:
    assert parser_case("x.json") is None
    with pytest.raises(ConfigError, match="there is no parser 'sprit'"):
        parser_case("sprit:1:1")
    with pytest.raises(ValueError, match="expected a parser"):
        run_parser_case(Case("parser", "sprit"))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_reports_what_it_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fuzz", "parsers", "--seed=3", "--cases=100", "--report=report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["notes"] == dict.fromkeys(PARSERS, 100)
    assert (report["cases"], report["findings"]) == (100 * len(PARSERS), [])
    assert "  split: 100" in capsys.readouterr().out
    assert main(["fuzz", "parsers", "--replay", "split:3:99", "messages:3:4"]) == 0
    assert capsys.readouterr().out == "split:3:99: nothing found\nmessages:3:4: nothing found\n"


def test_what_was_run_until_it_is_ended_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vfiouser_virtio", "fuzz", "parsers", "--seed=3", "--seconds=600"]
    with subprocess.Popen([*command, "--report=report.json"], cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"seed 3" in process.stderr.readline()
        assert b"cases" in process.stderr.readline()  # the first line of progress, after some seconds
        process.terminate()
        process.communicate()
    assert process.returncode == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cases"] > 0
    assert report["findings"] == []
