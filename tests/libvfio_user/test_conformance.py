"""Our devices behind libvfio-user keep every rule of virtio, and those of vfio-user that the library keeps."""

from collections.abc import Iterator

import pytest
import trio
from support.conformance_target import DEVICES

from vfiouser_virtio.libvfio_user import Library
from vfiouser_virtio.libvfio_user.engine import LibraryEngine
from vfiouser_virtio.testing.conformance import CHECKS, Result, Verdict, Wire, run_checks
from vfiouser_virtio.testing.conformance.verdicts import GOOD
from vfiouser_virtio.testing.served import served
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.slow

LIMITS = {
    "vfio-user/pieces": "it drops a client whose message comes in pieces (if it is fast enough to see that)",
    "vfio-user/dma-messages": "memory without a file descriptor is not reached",
    "vfio-user/twin-socket": "nor with a twin socket",
}
"""Checks that fail because of the library, and why; docs/libvfio-user.md has them, too."""

EVERYTHING = Offer(packed=True, in_order=True, notification_data=True, suspend=True)


@pytest.fixture(autouse=True)
def _no_bug_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The checks break rules themselves, which the server logs: but never with a traceback."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


async def check(library: Library, name: str, offer: Offer | None) -> list[Result]:
    with trio.fail_after(120):
        async with served(DEVICES[name](), offer=offer, engine=LibraryEngine(library)) as at:
            return [result async for result in run_checks(Wire(str(at.path), timeout=2.0), CHECKS.values())]


@pytest.mark.parametrize(("name", "offer"), [*((name, None) for name in DEVICES), ("blk", EVERYTHING)])
async def test_only_the_librarys_own_limits_fail(libvfio_user: Library, name: str, offer: Offer | None) -> None:
    results = await check(libvfio_user, name, offer)
    failed = {result.check_id: result for result in results if result.verdict not in GOOD}
    assert not [f"{name}: {result.detail}" for name, result in failed.items() if name not in LIMITS]
    broke = {name for name, result in failed.items() if result.verdict != Verdict.FAIL}
    assert broke == {"vfio-user/pieces"}, "no other limit ends the connection"
    assert failed.keys() == LIMITS.keys(), "one that does not hold is to be taken out of LIMITS and of the docs"
