"""The fuzzer of foreign servers: it finds what is wrong with one, makes it small, and finds nothing in a good one."""

import json
import math
import random
import shlex
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from vfiouser_virtio.cli import main
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz import servers
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.jobs import Share, run_jobs
from vfiouser_virtio.testing.fuzz.message_step import payload, payload_of
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.report import Discovery, FuzzReport
from vfiouser_virtio.testing.fuzz.servers import ServerRun, check_jobs, fuzz_server, replay_on_server
from vfiouser_virtio.testing.fuzz.servers import run as servers_run
from vfiouser_virtio.testing.fuzz.servers.grammar import conversation
from vfiouser_virtio.testing.fuzz.servers.judge import Judge
from vfiouser_virtio.testing.fuzz.servers.mutations import generate
from vfiouser_virtio.testing.fuzz.servers.output import telltale
from vfiouser_virtio.testing.fuzz.servers.replies import fds_complaint
from vfiouser_virtio.testing.fuzz.servers.server import FuzzedServer
from vfiouser_virtio.testing.fuzz.servers.shown import ShownDevice
from vfiouser_virtio.testing.raw.client import RawMessage, raw_message

SERVER = Path(__file__).parents[1] / "support/fragile_server.py"
# A machine that does ten other things must not make a hang of a reply that is late.
PATIENT = 60.0
VERSION: Step = {"do": "message", "command": "VERSION", "fields": {}, "text": '{"capabilities": {}}\0'}


def command(fault: str = "") -> str:
    # Isolated, and without site-packages: 15 ms.
    return f"{shlex.quote(sys.executable)} -IS {shlex.quote(str(SERVER))} {{socket}} {fault}"


def message(name: str, **content: object) -> Step:
    return {"do": "message", "command": name, "id": 2, **content}


def judged(folder: Path, fault: str, *steps: Step, wait: float = PATIENT) -> Finding | None:
    """What is found in one case, and how the server does afterwards."""
    case = Case("conversation", "socket", steps=[VERSION, *steps])
    run = ServerRun(folder / "x.sock", 0, restart=command(fault), wait=wait)
    return replay_on_server(run, case)


EMPTY_MAP = message("DMA_MAP", fields={"argsz": 32, "flags": 3, "size": 0})


FAULTS = pytest.mark.parametrize(
    ("fault", "step", "kind", "where"),
    [
        ("segv", EMPTY_MAP, "crash", "SIGSEGV after DMA_MAP"),
        ("assert", EMPTY_MAP, "crash", "dma.c:12: map: Assertion `size > 0' failed"),
        ("exit", EMPTY_MAP, "exit", "size is zero"),
        (
            "wrong-id",
            message("DEVICE_GET_IRQ_INFO", fields={"argsz": 16, "index": 9}),
            "reply",
            "unasked DEVICE_GET_IRQ_INFO",
        ),
        (
            "wrong-command",
            message("DEVICE_GET_IRQ_INFO", fields={"argsz": 16, "index": 9}),
            "reply",
            "unasked unknown command",
        ),
        ("long", message("DEVICE_GET_REGION_INFO", fields={"argsz": 8}), "reply", "body DEVICE_GET_REGION_INFO"),
        ("leak", message("DEVICE_RESET", fds=["memfd", "eventfd", "null"]), "leak", "fds"),
        ("posted", message("DEVICE_RESET", flags=0x10), "reply", "unasked DEVICE_RESET"),
        (
            "ubsan",
            message("DEVICE_SET_IRQS", fields={"argsz": 20, "flags": 0x24, "count": 100}),
            "sanitizer",
            "irq.c:7:9: runtime error: index 100 out of bounds",
        ),
    ],
)


@FAULTS
def test_what_is_wrong_with_a_server_is_found(tmp_path: Path, fault: str, step: Step, kind: str, where: str) -> None:
    # The next message tells that what came before was looked at.
    after = message("DEVICE_GET_INFO", fields={"argsz": 16}, id=3)
    found = judged(tmp_path, fault, step, after)
    assert found is not None
    assert (found.kind, found.where) == (kind, where), found
    assert judged(tmp_path, "", step, after) is None


def found_of_silence(folder: Path, fault: str, step: Step, kind: str, where: str) -> Finding | None:
    """What is found of a server that does not answer: with little patience, and with ever more where a machine that
    does ten other things has made another finding of that, such as a reply that was merely late."""
    for wait in (0.5, 5.0, PATIENT):
        found = judged(folder, fault, step, wait=wait)
        if found is not None and found.kind == kind and found.where.startswith(where):
            break
    return found


def test_a_reply_that_does_not_come(tmp_path: Path) -> None:
    step = message("DEVICE_GET_IRQ_INFO", fields={"argsz": 16, "index": 9})
    found = found_of_silence(tmp_path, "silent", step, "hang", "DEVICE_GET_IRQ_INFO")
    assert found is not None
    assert (found.kind, found.where) == ("hang", "DEVICE_GET_IRQ_INFO")


def test_a_server_that_does_not_get_over_half_a_message(tmp_path: Path) -> None:
    found = found_of_silence(tmp_path, "stuck", {"do": "raw", "data": "0100"}, "broken", "")
    assert found is not None
    assert found.kind == "broken"
    assert judged(tmp_path, "", {"do": "raw", "data": "0100"}, {"do": "hang_up"}, VERSION) is None


def test_a_server_that_ends_after_each_client_is_started_for_each(tmp_path: Path) -> None:
    assert judged(tmp_path, "once", message("DEVICE_RESET"), {"do": "hang_up"}, VERSION) is None


class Replays:
    """A case that finds something by the command, and again from its file by the command that is printed."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        fault: str,
        minimize_seconds: float = math.inf,
    ) -> None:
        self._folder, self._capsys, self._patch = folder, capsys, monkeypatch
        self._words = ["fuzz", "socket", "--restart", command(fault)]
        monkeypatch.setattr(servers, "ServerRun", partial(ServerRun, minimize_seconds=minimize_seconds))

    def found(self, *steps: Step, wait: float = PATIENT) -> tuple[list[Step], str]:
        """What is left of the steps, and the finding; nothing where none is found."""
        case = Case("conversation", "socket", steps=list(steps), origin="here")
        self._patch.setattr(servers_run, "generate", lambda *_: case)
        words = [*self._words, f"--wait={wait:g}", str(self._folder / "x.sock")]
        out = self._folder / f"found-{wait:g}"
        status = main([*words, "--cases=1", f"--out={out}"])
        if not out.exists():
            assert status == 0
            return [], ""
        [again] = [line for line in self._capsys.readouterr().out.splitlines() if line.startswith("-> ")]
        [file] = out.iterdir()
        again_words = shlex.split(again.removeprefix("-> "))
        assert again_words == ["vfiouser-virtio", *words, "--replay", str(file)]
        found = main(again_words[1:])
        said = self._capsys.readouterr().out.removeprefix(f"{file}: ")
        assert (status, found) == (1, not said.startswith("nothing found"))
        return Case.load(file).steps, said


@pytest.fixture
def replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Replays]:
    return partial(Replays, tmp_path, monkeypatch, capsys)


@FAULTS
def test_each_kind_of_finding_is_made_small_and_replayed(
    replays: Callable[..., Replays], fault: str, step: Step, kind: str, where: str
) -> None:
    after = message("DEVICE_GET_INFO", fields={"argsz": 16}, id=3)
    # Two clients at a time, messages in one write, and descriptors that are not needed.
    noise = [after | {"client": 1, "wait": False}, after | {"later": True}, after | {"fds": ["null", "eventfd"]}]
    small, said = replays(fault).found(VERSION, *noise, step, after, *noise)
    assert said.startswith(kind), said
    assert len(small) <= 3
    assert not any("client" in each or "later" in each for each in small)


@pytest.mark.parametrize(
    ("fault", "step", "kind"),
    [
        ("silent", message("DEVICE_GET_IRQ_INFO", fields={"argsz": 16, "index": 9}), "hang"),
        ("stuck", {"do": "raw", "data": "0100"}, "broken"),
    ],
)
def test_silence_is_replayed_too(replays: Callable[..., Replays], fault: str, step: Step, kind: str) -> None:
    tried = replays(fault, PATIENT / 10)  # each try of a hang takes as long as one
    said = ""
    for wait in (0.5, 5.0, PATIENT):  # as in `found_of_silence`
        _, said = tried.found(VERSION, message("DEVICE_RESET"), step, wait=wait)
        if said.startswith(kind):
            break
    assert said.startswith(kind), said


class Ran:
    """A run of its own, and what it told."""

    def __init__(self, run: ServerRun, cases: int, *, jobs: int = 1, stop: int = 1) -> None:
        self.report = FuzzReport("x", run.seed)
        run_jobs(
            fuzz_server, run, self.report, cases=cases, seconds=None, jobs=jobs, stop=stop, on_found=lambda _: None
        )

    @property
    def found(self) -> list[Discovery]:
        return self.report.discoveries


@pytest.mark.slow
def test_a_crash_is_found_by_a_seed_made_small_and_can_be_replayed(tmp_path: Path) -> None:
    # Each wait for a server that is dying, and has not been seen to be dead, takes so long: a minute would be too much.
    run = ServerRun(tmp_path / "x.sock", 3, restart=command("segv"), out=tmp_path / "found", wait=PATIENT / 3)
    [found] = Ran(run, 2000).found
    kind, place = found.key
    # After the message that kills it, or one behind that, which was sent before the death was seen.
    assert (kind, place.partition(" after ")[0]) == ("crash", "SIGSEGV")
    case = Case.load(Path(found.path))
    maps = [step for step in case.steps if step.get("command") == "DMA_MAP"]
    assert any(not int.from_bytes(payload_of(step)[24:32], "little") for step in maps)
    assert len(case.steps) <= 3  # with a VERSION, or without: this server does not mind
    again = replay_on_server(run, case)
    assert again is not None
    assert again.kind == "crash"
    assert replay_on_server(ServerRun(tmp_path / "x.sock", 0, restart=command(), wait=PATIENT), case) is None


def test_nothing_is_found_in_a_good_server(tmp_path: Path) -> None:
    run = ServerRun(tmp_path / "x.sock", 7, restart=command(), out=tmp_path / "found", wait=PATIENT)
    ran = Ran(run, 60)
    assert ran.found == [], ran.found[0].finding
    assert ran.report.cases == 60
    assert not (tmp_path / "found").exists()
    assert not (tmp_path / "x.sock").exists()


def test_jobs_have_a_server_each_and_share_the_cases(tmp_path: Path) -> None:
    run = ServerRun(tmp_path / "x.sock", 7, restart=command(), out=tmp_path / "found", wait=PATIENT)
    ran = Ran(run, 20, jobs=2)
    assert (ran.report.cases, ran.found) == (20, [])
    assert ran.report.notes["starts of the server"] == 2
    with pytest.raises(ConfigError, match="a server of its own"):
        check_jobs(ServerRun(tmp_path / "x.sock", 0, restart="server /tmp/x.sock"), 2)


def test_a_server_that_is_not_ours_to_start(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    server = FuzzedServer(path, FuzzedServer.command_of(command("segv"), path))
    server.start()

    async def find() -> tuple[Finding | None, Finding | None]:
        sock = await server.connect(PATIENT)
        sock.close()
        judge = Judge(FuzzedServer(path), wait=PATIENT)
        await judge.get_to_know()
        return await judge.judge([VERSION]), await judge.judge([VERSION, EMPTY_MAP])

    try:
        nothing, found = trio.run(find)
    finally:
        server.stop()
    assert nothing is None
    assert found is not None
    assert (found.kind, found.where) == ("crash", "after DMA_MAP")


@pytest.mark.parametrize(
    ("restart", "said"),
    [
        ("nosuchprogram {socket}", "there is no program 'nosuchprogram'"),
        ("'", "No closing quotation"),
        (f"{sys.executable} -c 'print(\"no licence\")'", "ended with status 0 before it listened: no licence"),
    ],
)
def test_a_command_that_starts_no_server(tmp_path: Path, restart: str, said: str) -> None:
    run = ServerRun(tmp_path / "x.sock", 0, restart=restart)
    share = Share(lambda _what, _value: None, threading.Event(), cases=1)
    with pytest.raises(ConfigError, match=said):
        fuzz_server(run, share)


def test_cases_are_the_same_each_time_and_say_what_they_mean(tmp_path: Path) -> None:
    shown = ShownDevice({0: 0x1000, 7: 0x100}, {0: 1, 2: 4})
    case = generate(1, 2, shown)
    assert case == generate(1, 2, shown) != generate(1, 3, shown)
    path = tmp_path / "case.json"
    path.write_text(case.dumps())
    assert Case.load(path) == case
    assert json.loads(path.read_text())["kind"] == "conversation"


@pytest.fixture(scope="module")
def good_steps() -> list[Step]:
    return [step for seed in range(200) for step in conversation(random.Random(seed), ShownDevice())]


def test_every_command_of_a_client_is_in_the_grammar(good_steps: list[Step]) -> None:
    from vfiouser_virtio.protocols.vfio_user import COMMANDS, Command, Direction

    spoken = {step["command"] for step in good_steps}
    asked = {each.name for each in Command if COMMANDS[each].direction is Direction.CLIENT_TO_SERVER}
    assert asked == spoken


def test_fields_are_bytes_where_the_schema_has_them() -> None:
    fields = {"argsz": 32, "address": 0x1000, "size": -1}
    assert payload("DMA_MAP", fields=fields).hex() == "20000000" + "00" * 12 + "0010000000000000" + "ff" * 8
    assert payload("VERSION", fields={"minor": 1}, text="{}\0", data="ff").hex() == "00000100" + "7b7d00" + "ff"
    assert payload(99, body="0102") == b"\1\2"
    mistakes: list[dict[str, Any]] = [{"command": "DMA_MOP"}, {"command": 1, "body": "x"}]
    for mistake in (*mistakes, {"command": "DMA_MAP", "fields": {"sise": 1}}):
        with pytest.raises(ValueError, match=r"DMA_MOP|sise|hex"):
            payload(**mistake)


def test_what_sanitizers_and_run_times_say_is_recognised_without_what_changes() -> None:
    asan = b"==77==ERROR: AddressSanitizer: heap-use-after-free on address 0x602000000010\n#0 0x1 in f\n"
    asan += b"SUMMARY: AddressSanitizer: heap-use-after-free /src/lib/dma.c:10 in dma_map\n"
    assert telltale(asan) == "AddressSanitizer: heap-use-after-free /src/lib/dma.c:10 in dma_map"
    assert telltale(b"thread 'main' panicked at src/main.rs:3:5:\n") == "panicked at src/main.rs:3:5:"
    assert telltale(b"Traceback (most recent call last):\n  File x\nKeyError: 3\n") == "KeyError: 3"
    assert telltale(b"all is well\n") == ""


def test_a_socket_for_dma_requests_belongs_to_a_version_that_asks_for_it() -> None:
    def complaint(text: str, flags: int = 1, command: int = 1) -> str:
        reply = RawMessage(raw_message(command, bytes(4), flags=flags), [3])
        return fds_complaint(reply, command, bytes(4) + text.encode())

    twin = '{"capabilities": {"twin_socket": {"supported": true}}}\0'
    assert complaint(twin) == ""
    assert "where none belong" in complaint("{}\0")
    assert "where none belong" in complaint(twin, flags=0x21)
    assert "where none belong" in complaint(twin, command=13)


def test_a_reply_is_to_what_must_be_answered_if_two_messages_have_its_id(tmp_path: Path) -> None:
    again = message("DEVICE_RESET")
    assert judged(tmp_path, "", again | {"flags": 1}, again, again) is None
