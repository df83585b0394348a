"""The checks can be trusted: each fails on a server that is broken in its respect, and passes on one that is not."""

import logging
from collections.abc import Iterator

import pytest
from support import broken_devices, broken_packed, broken_protocol, broken_rings  # noqa: F401 - they fill the table
from support.broken import BROKEN
from support.conformance_target import serving
from support.faithful import FAITHFUL

from vfiouser_virtio.testing.conformance import CHECKS, Verdict, run_check

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What these servers log about themselves is of no interest."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_check_has_a_broken_server() -> None:
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("check_id", sorted(BROKEN))
async def test_a_broken_server_fails(check_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[check_id]
    broken.change(monkeypatch)
    async with serving(broken.device, offer=broken.offer, timeout=1) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict in (Verdict.FAIL, Verdict.BROKE), result
    assert "no virtio device was found" not in result.detail, "the check itself has seen nothing"


@pytest.mark.parametrize("check_id", sorted(FAITHFUL))
async def test_a_faithful_device_passes(check_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, device = FAITHFUL[check_id]
    change(monkeypatch)
    async with serving(device) as wire:
        result = await run_check(wire, CHECKS[check_id])
    assert result.verdict is Verdict.PASS, result
