"""Runs checks one after the other, each on a connection of its own, and goes on when one has broken the server."""

import errno
from collections.abc import AsyncIterator, Iterable
from time import perf_counter

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.testing.conformance.checks import Check
from vfiouser_virtio.testing.conformance.verdicts import Failed, NotApplicable, Result, Verdict
from vfiouser_virtio.testing.conformance.wire import Wire
from vfiouser_virtio.vfio_user import ConnectError, RemoteError

COMES_BACK = 5.0
"""Seconds in which a server that was broken may come back (systemd, a supervisor) before the rest is not run."""

_PAUSE = 0.1  # seconds between two tries to connect
_LIMIT_FACTOR = 10  # a check may take this many times the patience for one reply


async def run_checks(wire: Wire, checks: Iterable[Check]) -> AsyncIterator[Result]:
    """The results, in order, as they come. Raises ConnectError when nobody listens in the first place."""
    async with wire.connect():
        pass
    gone = ""
    for check in checks:
        if gone:
            yield Result(check.id, Verdict.NOT_RUN, gone)
            continue
        result = await run_check(wire, check)
        yield result
        if result.verdict is not Verdict.PASS and not await _comes_back(wire):
            gone = f"the server has not come back within {COMES_BACK:g} s after {check.id}"


async def run_check(wire: Wire, check: Check) -> Result:
    """One check; whatever it raises is a verdict, unless it is a bug of its own."""
    started = perf_counter()
    verdict, detail = Verdict.PASS, ""
    with trio.move_on_after(wire.timeout * _LIMIT_FACTOR) as scope:
        verdict, detail = await _judge(wire, check)
    if scope.cancelled_caught:
        verdict, detail = Verdict.BROKE, f"no end within {wire.timeout * _LIMIT_FACTOR:g} s"
    return Result(check.id, verdict, detail, perf_counter() - started)


async def _judge(wire: Wire, check: Check) -> tuple[Verdict, str]:
    try:
        await check.run(wire)
    except NotApplicable as reason:
        return Verdict.NOT_APPLICABLE, str(reason)
    except (Failed, DeviceBroken, RemoteError) as error:
        return Verdict.FAIL, str(error)
    except PeerError as error:
        # EPROTO: it said something that it must not say; else it went, or is silent.
        return (Verdict.FAIL if error.errno == errno.EPROTO else Verdict.BROKE), str(error)
    except ConnectError as error:
        return Verdict.BROKE, str(error)
    return Verdict.PASS, ""


async def _comes_back(wire: Wire) -> bool:
    with trio.move_on_after(COMES_BACK):
        while True:
            try:
                async with wire.connect():
                    return True
            except (ConnectError, PeerError, RemoteError):
                await trio.sleep(_PAUSE)
    return False
