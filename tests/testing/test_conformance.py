"""`vfiouser_virtio.testing.conformance`: our own devices keep every rule, and the reports say what was found."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trio
import trio.testing
from support.broken import faulty, made_with
from support.conformance_target import DEVICES, serving
from support.faithful import answering

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.testing.conformance import (
    CHECKS,
    IN_PART,
    NOT_CHECKED,
    Check,
    Result,
    Verdict,
    Wire,
    as_json,
    as_junit,
    document,
    run_check,
    run_checks,
    summary,
    text_line,
)
from vfiouser_virtio.testing.conformance.checks import NET
from vfiouser_virtio.testing.conformance.peer_verdicts import SPDK_ADVICE, SPDK_FAILURES, SPDK_NEWER, SPDK_SUMMARY
from vfiouser_virtio.testing.conformance.placed import Placed, place_request
from vfiouser_virtio.testing.conformance.verdicts import GOOD, Failed, NotApplicable
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.slow

TOP = Path(__file__).parents[2]
# The checklist of transport and ring rules (virtio 1.4).
ROWS = [
    *(
        "ST1",
        "ST2",
        "FB1",
        "FB2",
        "FB3",
        "RB1",
        "RB2",
        "RB3",
        "RS1",
        "RS2",
        "CF1",
        "QR1",
        "QR2",
        "QR3",
        "SU1",
        "SU2",
        "SU3",
    ),
    *(
        "MF1",
        "SD1",
        "SI1",
        "SI2",
        "UN1",
        "UN2",
        "UR1",
        "UR2",
        "AN1",
        "AN2",
        "PK1",
        "PK2",
        "PK3",
        "PK4",
        "PK5",
        "SH1",
        "PI1",
    ),
    *(
        "PI2",
        "PI3",
        "PI4",
        "PC1",
        "CC1",
        "CC2",
        "CC3",
        "CC4",
        "CC5",
        "CC6",
        "CC7",
        "CC8",
        "CC9",
        "NT1",
        "NT2",
        "NT3",
        "IS1",
    ),
    *("IS2", "IS3", "DC1", "SM1", "VD1", "PA1", "MX1", "MX2", "MX3", "LG1"),
]
# What a device of ours does not have, whatever it offers, and nothing else, is not applicable.
ABSENT = {"SM1", "VD1", "CC9", "RB3", "write-multi"}
# Checks that need a feature which is not offered by default.
SWITCHED = {
    "packed": {name.partition("/")[2] for name in CHECKS if name.startswith("virtio14/PK")} | {"MF1-packed"},
    "in_order": {"RB2"},
    "notification_data": {"ND1"},
    "notif_config_data": {"ND2"},
    "suspend": {"SU1", "SU2", "SU3"},
}
# What some device types have no use for.
EVERYTHING = Offer(packed=True, in_order=True, notification_data=True, notif_config_data=True, suspend=True)
OF_SOME_TYPES = {"CF1", "CC4", "UR2", "UR2-readable", "PK3", "PK4", "MF1-packed"} | {
    name.partition("/")[2] for name, check in CHECKS.items() if NET in check.needs
}


@pytest.fixture(autouse=True)
def _no_bug_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The checks break rules themselves, which the server logs: but never with a traceback."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


async def all_results(wire: Wire) -> dict[str, Result]:
    return {result.check_id: result async for result in run_checks(wire, CHECKS.values())}


def verdicts(results: dict[str, Result]) -> tuple[dict[str, str], set[str]]:
    """What has failed, with its reason, and what is not applicable."""
    failed = {name: each.detail for name, each in results.items() if each.verdict not in GOOD}
    absent = {name for name, each in results.items() if each.verdict is Verdict.NOT_APPLICABLE}
    return failed, {name.partition("/")[2] for name in absent}


# How a device is called is apart from its type.
@pytest.mark.parametrize(
    ("name", "ids"),
    [
        *((name, "default") for name in DEVICES),
        pytest.param("blk", "qemu", marks=pytest.mark.variant),
        pytest.param("rng", "2007", marks=pytest.mark.variant),
    ],
)
async def test_our_devices(name: str, ids: Style) -> None:
    async with serving(name, ids=ids) as wire:
        failed, absent = verdicts(await all_results(wire))
    if ids == "2007":  # the vendor of the 2007 draft is not the one that virtio has now
        assert failed == {"virtio14/PI2": "vendor id is 0x5000, not 0x1af4"}
    else:
        assert failed == {}
    expected = ABSENT | set[str]().union(*SWITCHED.values(), {"RB2-packed"})
    assert absent - expected <= OF_SOME_TYPES
    assert absent >= expected


@pytest.mark.parametrize(
    "name", [name if name == "blk" else pytest.param(name, marks=pytest.mark.variant) for name in DEVICES]
)
async def test_our_devices_with_every_switch(name: str) -> None:
    """All that is not on by default; ioeventfds are ruled out by NOTIFICATION_DATA."""
    async with serving(name, offer=EVERYTHING) as wire:
        failed, absent = verdicts(await all_results(wire))
    assert all(getattr(EVERYTHING, switch) for switch in SWITCHED)
    assert failed == {}
    assert absent - ABSENT - {"io-fds"} <= OF_SOME_TYPES


@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(Offer(event_idx=False, indirect_desc=False, queue_reset=False), id="bare"),
        pytest.param(Offer(packed=True, queue_size=7), id="packed-7", marks=pytest.mark.variant),
    ],
)
async def test_other_offers(offer: Offer) -> None:
    """A check that does not apply says so, whatever is missing; everything that does apply is kept."""
    async with serving("blk", offer=offer) as wire:
        failed, absent = verdicts(await all_results(wire))
    assert failed == {}
    for switch, checks in SWITCHED.items():
        assert getattr(offer, switch) or checks <= absent


def test_every_row_of_the_checklist_is_accounted_for() -> None:
    assert len(ROWS) == 61
    assert {f"virtio14/{row}" for row in ROWS} <= {*CHECKS, *NOT_CHECKED}
    assert not {*CHECKS} & {*NOT_CHECKED}
    assert {*IN_PART} <= {*CHECKS}


def test_the_document_is_up_to_date() -> None:
    assert (TOP / "docs" / "conformance.md").read_text() == document(), (
        "python -m vfiouser_virtio.testing.conformance > docs/conformance.md"
    )


def test_the_verdicts_about_others_are_of_checks_that_there_are() -> None:
    """Each failure that SPDK is said to have has its sentence, of a check that can fail for it; advice has none."""
    assert {*SPDK_FAILURES} <= {*CHECKS}
    assert all(seen and text for seen, text in SPDK_FAILURES.values())
    assert "advice" not in {CHECKS[check_id].keyword for check_id in SPDK_FAILURES}
    assert {CHECKS[check_id].keyword for check_id in SPDK_ADVICE} == {"SHOULD", "advice"}
    assert {CHECKS[check_id].keyword for check_id in SPDK_FAILURES} == {"MUST"}
    assert f"{len(SPDK_FAILURES)} fail, {len(SPDK_ADVICE)} advice" in SPDK_SUMMARY
    assert all(NET in CHECKS[check_id].needs for check_id in SPDK_NEWER)
    assert sum(int(count) for count in re.findall(r"\d+", SPDK_SUMMARY)) == len(CHECKS) - len(SPDK_NEWER)


def test_the_package_prints_the_document() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "vfiouser_virtio.testing.conformance"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == document()


# ---- the runner ----------------------------------------------------------------------------------------------------


def made_up(check_id: str, run: Callable[[Wire], Awaitable[None]]) -> Check:
    return replace(CHECKS[check_id], run=run)


async def test_it_goes_on_when_a_server_comes_back() -> None:
    async def silent(wire: Wire) -> None:
        async with wire.connect() as client:
            await client.exchange(200, size=64)  # it waits for 48 bytes more

    async def gone(wire: Wire) -> None:
        async with wire.connect() as client:
            client.send_raw(bytes(16))
            await client.exchange(13)

    async def fails(_wire: Wire) -> None:
        raise Failed("seen")

    async def does_not_apply(_wire: Wire) -> None:
        raise NotApplicable("reason")

    ids = list(CHECKS)
    checks = [made_up(ids[at], run) for at, run in enumerate((silent, gone, fails, does_not_apply))]
    async with serving("rng", timeout=2) as wire:
        results = [result async for result in run_checks(wire, [*checks, CHECKS["virtio14/RB1"]])]
    assert [result.verdict for result in results] == [
        Verdict.BROKE,
        Verdict.BROKE,
        Verdict.FAIL,
        Verdict.NOT_APPLICABLE,
        Verdict.PASS,
    ]
    assert "no reply within 2 s" in results[0].detail
    assert "the server closed the connection" in results[1].detail


async def test_it_stops_when_a_server_is_gone(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfiouser_virtio.devices.rng import Rng
    from vfiouser_virtio.testing.conformance import runner
    from vfiouser_virtio.transports import VirtioPci
    from vfiouser_virtio.vfio_user import Server, listen_path

    monkeypatch.setattr(runner, "COMES_BACK", 0.3)
    served = trio.CancelScope()
    path = tmp_path / "s.sock"

    async def serve() -> None:
        with served, listen_path(path) as listener:
            await Server(VirtioPci(Rng())).serve(listener)

    async def kill(_wire: Wire) -> None:
        served.cancel()
        await trio.testing.wait_all_tasks_blocked()  # until the listening socket is closed
        raise Failed("killed")

    nursery.start_soon(serve)
    await trio.testing.wait_all_tasks_blocked()
    checks = [made_up("virtio14/RB1", kill), CHECKS["virtio14/PI2"], CHECKS["virtio14/PI3"]]
    results = [result async for result in run_checks(Wire(path, timeout=0.5), checks)]
    assert [result.verdict for result in results] == [Verdict.BROKE, Verdict.NOT_RUN, Verdict.NOT_RUN]
    assert results[0].detail == "the server has died: its socket has no listener; before: killed"
    assert "has not come back within 0.3 s after virtio14/RB1" in results[1].detail


async def test_a_request_that_fails_for_its_own_sake_is_nobody_elses_verdict() -> None:
    checks = [CHECKS[f"virtio14/{name}"] for name in ("RQ1", "IS1", "MF1", "PI2")]
    async with serving("rng", make=faulty("used-len-short")) as wire:
        results = [result async for result in run_checks(wire, checks)]
    assert [each.verdict for each in results] == [Verdict.FAIL, Verdict.NOT_RUN, Verdict.NOT_RUN, Verdict.PASS]
    assert "failed for its own sake (virtio14/RQ1): used.len is 0x0" in results[1].detail


async def test_all_findings_are_reported() -> None:
    from support.broken_devices import HasQueuesOfThree

    async with serving("rng", make=made_with(HasQueuesOfThree)) as wire:
        result = await run_check(wire, CHECKS["virtio14/CC8"])
    assert [part.split()[1] for part in result.detail.split("; ")] == ["0x41,", "0x7fff,", "0xffff,"]


async def test_a_refused_register_is_named_and_one_that_is_not_offered_is_left_alone() -> None:
    """As SPDK's target, which refuses all of the common configuration from 0x38 on."""

    def refuses(_cfg: object, _original: object) -> int:
        raise PeerError("no such register", errno.EIO)

    make = made_with(answering(queue_reset=refuses))
    async with serving("rng", make=make) as wire:
        offered = await run_check(wire, CHECKS["virtio14/CC6"])
    assert offered.detail == "a read of queue_reset is refused: Input/output error"
    async with serving("rng", offer=Offer(queue_reset=False), make=make) as wire:
        without = await run_check(wire, CHECKS["virtio14/CC6"])
    assert without.verdict is Verdict.PASS, without


FRAMING = {"virtio14/MF1", "virtio14/MF1-packed"}


async def test_requests_are_cut_as_linux_does_but_in_the_checks_of_framing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPDK's target wants the status of a block request in a descriptor of its own."""
    from vfiouser_virtio.testing.conformance import bench

    cuts: set[tuple[int, ...]] = set()

    def place(*arguments: Any, **named: Any) -> Placed:
        placed = place_request(*arguments, **named)
        cuts.add(tuple(length for _address, length, _writable in placed.segments))
        return placed

    monkeypatch.setattr(bench, "place_request", place)
    others = set()
    async with serving("blk", offer=Offer(packed=True, in_order=True, suspend=True)) as wire:
        for check in CHECKS.values():
            cuts.clear()
            await run_check(wire, check)
            if cuts - {(16, 512, 1)}:
                others.add(check.id)
    assert others == FRAMING


# ---- reports -------------------------------------------------------------------------------------------------------

RESULTS = [
    Result("virtio14/RB1", Verdict.PASS, "", 0.25),
    Result("virtio14/PI2", Verdict.FAIL, "vendor id is \x07 <5000>", 0.5),
    Result("virtio14/SU1", Verdict.NOT_APPLICABLE, "needs SUSPEND offered"),
    Result("vfio-user/order", Verdict.BROKE, "no reply within 2 s", 2),
    Result("vfio-user/argsz", Verdict.NOT_RUN, "gone"),
    Result("vfio-user/dma-map-argsz", Verdict.ADVICE, "of size 0"),
]


def test_text() -> None:
    failure = text_line(RESULTS[1])
    assert failure.startswith("FAIL  virtio14/PI2 ")
    for part in ("PCI Device Discovery, MUST", "rule: The vendor id is 1AF4", "look: vendor and", "seen: vendor id is"):
        assert part in failure
    assert re.match(r"n/a +virtio14/SU1 +needs SUSPEND offered$", text_line(RESULTS[2]))
    assert text_line(RESULTS[3]).startswith("BROKE vfio-user/order")
    assert summary(RESULTS) == ("6 checks: 1 pass, 1 fail, 1 advice, 1 not applicable, 1 broke the server, 1 not run")
    assert text_line(RESULTS[5]).startswith("note  vfio-user/dma-map-argsz")


def test_json() -> None:
    report = json.loads(as_json("/run/x", RESULTS))
    assert report["server"] == "/run/x"
    assert report["summary"] == {each.value: 1 for each in Verdict}
    assert report["checks"][1] == {
        "id": "virtio14/PI2",
        "section": "PCI Device Discovery",
        "keyword": "MUST",
        "rule": CHECKS["virtio14/PI2"].rule,
        "observed": "vendor and device id in config space",
        "needs": [],
        "verdict": "fail",
        "detail": "vendor id is \x07 <5000>",
        "seconds": 0.5,
    }


def test_junit() -> None:
    suite = ElementTree.fromstring(as_junit("/run/x", RESULTS))
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "6",
        "failures": "1",
        "errors": "2",
        "skipped": "2",
        "time": "2.750",
    }
    cases = [(case.get("classname"), case.get("name"), [child.tag for child in case]) for case in suite]
    assert cases == [
        ("virtio14", "RB1", []),
        ("virtio14", "PI2", ["failure"]),
        ("virtio14", "SU1", ["skipped"]),
        ("vfio-user", "order", ["error"]),
        ("vfio-user", "argsz", ["error"]),
        ("vfio-user", "dma-map-argsz", ["skipped"]),
    ]
    assert suite[1][0].get("message") == "vendor id is ? <5000>"
