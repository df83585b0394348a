"""The checks can be trusted: each fails on a server that is broken in its respect, and passes on one that is not."""

import logging
import re

import pytest
from support import broken_devices, broken_packed, broken_protocol, broken_rings  # noqa: F401 - all fill the table
from support.broken import BROKEN, Make, Mutation, after, made_with
from support.conformance_target import serving
from support.faithful import FAITHFUL

from vfiouser_virtio.testing.conformance import CHECKS, Verdict, run_check
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.virtio import DeviceCore

pytestmark = pytest.mark.slow


def unexpected(records: list[logging.LogRecord], logs: str) -> list[str]:
    """The lines among them that the intended fault does not explain: a traceback never is."""
    return [
        f"{record.getMessage()} {record.exc_text or ''}".rstrip()
        for record in records
        if record.exc_info or not logs or not re.search(logs, record.getMessage())
    ]


def test_every_check_has_a_broken_server() -> None:
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("check_id", sorted(BROKEN))
async def test_a_broken_server_fails(
    check_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = BROKEN[check_id]
    broken.change(monkeypatch)
    async with serving(broken.device, offer=broken.offer, timeout=1, make=broken.make) as wire:
        result = await run_check(wire, CHECKS[check_id])
    expected = Verdict.FAIL if CHECKS[check_id].keyword == "MUST" else Verdict.ADVICE
    assert result.verdict in (expected, Verdict.BROKE), result
    assert "no virtio device was found" not in result.detail, "the check itself has seen nothing"
    assert not unexpected(caplog.records, broken.logs), "the check has seen another fault than the intended one"
    assert caplog.records or not broken.logs, "nothing was logged"


@pytest.mark.parametrize("check_id", sorted(FAITHFUL))
async def test_a_faithful_device_passes(
    check_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change, device = FAITHFUL[check_id]
    change(monkeypatch)
    async with serving(device) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict is Verdict.PASS, result
    assert not caplog.records


@pytest.mark.parametrize(
    ("check_id", "make", "change"),
    [
        ("virtio14/ST2", made_with(broken_devices.TakesErrorsLightly), None),
        ("vfio-user/twin-socket", VirtioPci, broken_protocol.sends_nothing_by_its_twin),
    ],
)
async def test_one_fault_is_not_accused_twice(
    check_id: str, make: Make, change: Mutation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `ST2-sets` and `dma-messages` say of it, a rule about how it is done does not say again."""
    if change is not None:
        change(monkeypatch)
    async with serving("rng", timeout=1, make=make) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict is Verdict.NOT_APPLICABLE, result


async def test_a_mistake_of_the_patch_itself_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ST1's and PK1's broken servers once failed by such: the checks had seen an error reply, and not their rule."""

    def written(self: DeviceCore, _value: int) -> None:
        self._name_that_is_not_there_any_more()  # type: ignore[attr-defined] # which is the point

    after(monkeypatch, DeviceCore, "write_status", written)
    async with serving("rng", timeout=1) as wire:
        result = await run_check(wire, CHECKS["virtio14/ST1"])
    assert result.verdict is Verdict.FAIL
    assert unexpected(caplog.records, "")
    assert unexpected(caplog.records, ".")
