"""The checks can be trusted: each fails on a server that is broken in its respect, and passes on one that is not."""

import functools
import logging
import re

import pytest
from support import (  # noqa: F401 - all fill the table
    broken_devices,
    broken_net,
    broken_net_peer,
    broken_net_tunnel,
    broken_packed,
    broken_protocol,
    broken_rings,
)
from support.broken import BROKEN, Make, made_with
from support.conformance_target import OF_A_JUMPING_CLOCK, serving, serving_on_a_hub
from support.faithful import FAITHFUL
from trio.testing import MockClock

from vfiouser_virtio.engines import VfioUserEngine
from vfiouser_virtio.testing.conformance import CHECKS, Verdict, run_check
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.vfio_user import Server
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.virtio import DeviceCore

pytestmark = pytest.mark.slow


def engine(session: type[Session]) -> VfioUserEngine:
    return VfioUserEngine(server=functools.partial(Server, session=session))


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
    check_id: str, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    broken = BROKEN[check_id]
    serve = serving_on_a_hub if broken.device == "net" else functools.partial(serving, broken.device)
    on = engine(broken.session)
    async with serve(offer=broken.offer, timeout=OF_A_JUMPING_CLOCK, make=broken.make, engine=on) as wire:
        result = await run_check(wire, CHECKS[check_id])
    expected = Verdict.FAIL if CHECKS[check_id].keyword == "MUST" else Verdict.ADVICE
    assert result.verdict in (expected, Verdict.BROKE), result
    assert "no virtio device was found" not in result.detail, "the check itself has seen nothing"
    assert not unexpected(caplog.records, broken.logs), "the check has seen another fault than the intended one"
    assert caplog.records or not broken.logs, "nothing was logged"


@pytest.mark.parametrize(
    ("check_id", "make", "write_multiple"),
    [("vfio-user/write-multi", VirtioPci, True), *((check_id, make, False) for check_id, make in FAITHFUL.items())],
)
async def test_a_faithful_device_passes(
    check_id: str,
    make: Make,
    write_multiple: bool,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    async with serving("rng", make=make, engine=VfioUserEngine(write_multiple=write_multiple)) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict is Verdict.PASS, result
    assert not caplog.records


@pytest.mark.parametrize(
    ("check_id", "make", "session"),
    [
        ("virtio14/ST2", made_with(broken_devices.TakesErrorsLightly), Session),
        ("vfio-user/twin-socket", VirtioPci, broken_protocol.SendsNothingByItsTwin),
    ],
)
async def test_one_fault_is_not_accused_twice(
    check_id: str, make: Make, session: type[Session], autojump_clock: MockClock
) -> None:
    """What `ST2-sets` and `dma-messages` say of it, a rule about how it is done does not say again."""
    async with serving("rng", timeout=OF_A_JUMPING_CLOCK, make=make, engine=engine(session)) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict is Verdict.NOT_APPLICABLE, result


async def test_a_mistake_of_the_fault_itself_does_not_count(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """ST1's and PK1's broken servers once failed by such: the checks had seen an error reply, and not their rule."""

    class Mistaken(DeviceCore):
        def write_status(self, value: int) -> Hold | None:
            super().write_status(value)
            return self._name_that_is_not_there_any_more()  # type: ignore[attr-defined,no-any-return] # the point

    async with serving("rng", timeout=OF_A_JUMPING_CLOCK, make=made_with(Mistaken)) as wire:
        result = await run_check(wire, CHECKS["virtio14/ST1"])
    assert result.verdict is Verdict.FAIL
    assert unexpected(caplog.records, "")
    assert unexpected(caplog.records, ".")
