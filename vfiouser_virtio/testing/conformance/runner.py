"""Runner of conformance checks: one after the other, each on its own connection, also after a crash of the server."""

import errno
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from time import perf_counter

import trio

from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.testing.conformance.checks import MUST, Check
from vfiouser_virtio.testing.conformance.verdicts import (
    FINDINGS,
    GOOD,
    ExerciseFailed,
    Failed,
    NotApplicable,
    Result,
    Verdict,
)
from vfiouser_virtio.testing.conformance.wire import Wire
from vfiouser_virtio.testing.raw.ring import RingFullError
from vfiouser_virtio.vfio_user import ConnectError, RemoteError

COMES_BACK = 5.0
"""Seconds in which a server that was broken may come back (systemd, a supervisor) before the rest is not run."""

_MAX_FINDINGS = 12  # of one check, in a report
_PAUSE = 0.1  # seconds between two tries to connect
_LIMIT_FACTOR = 10  # a check may take this many times the timeout for one reply


class ServesOnce(ConfigError):
    """Server that ends with its first client, which is not enough for more than one check."""


async def run_checks(wire: Wire, checks: Iterable[Check]) -> AsyncIterator[Result]:
    """The results, in order, as they come.

    Raises ConnectError when there is no listener at first, `ServesOnce` when the server ends with its first client,
    and PeerError or RemoteError when it does not agree on a version.
    """
    async with wire.connect():
        pass
    if not await _comes_back(wire):
        raise ServesOnce(
            f"'{wire.path}': the server has ended with its first client, as `serve --once` does; every check has a "
            "connection of its own: start it without"
        )
    gone = ""
    for check in checks:
        if gone:
            yield Result(check.id, Verdict.NOT_RUN, gone)
            continue
        result = await run_check(wire, check)
        died = result.verdict is not Verdict.BROKE and not await _lives(wire)
        if died:
            seen = f"; before: {result.detail}" if result.detail else ""
            result = replace(
                result, verdict=Verdict.BROKE, detail=f"the server has died: its socket has no listener{seen}"
            )
        yield result
        if result.verdict not in GOOD and not await _comes_back(wire):
            gone = f"the server has not come back within {COMES_BACK:g} s after {check.id}"


async def run_check(wire: Wire, check: Check) -> Result:
    """One check; whatever it raises is a verdict, unless it is a bug of its own."""
    started = perf_counter()
    verdict, detail = Verdict.PASS, ""
    findings: list[str] = []
    FINDINGS.set(findings)
    with trio.move_on_after(wire.timeout * _LIMIT_FACTOR) as scope:
        verdict, detail = await _judge(wire, check)
    if scope.cancelled_caught:
        verdict, detail = Verdict.BROKE, f"no end within {wire.timeout * _LIMIT_FACTOR:g} s"
    if findings:
        detail = "; ".join(filter(None, [*_first(findings), detail]))
        verdict = verdict if verdict is Verdict.BROKE else Verdict.FAIL
    if verdict is Verdict.FAIL and check.keyword != MUST:
        verdict = Verdict.ADVICE
    return Result(check.id, verdict, detail, perf_counter() - started)


def _first(findings: list[str]) -> list[str]:
    """What a report has room for: a server can be wrong about each of 65536 queues."""
    more = len(findings) - _MAX_FINDINGS
    return [*findings[:_MAX_FINDINGS], f"and {more} more of the kind"] if more > 0 else findings


async def _judge(wire: Wire, check: Check) -> tuple[Verdict, str]:
    try:
        await check.run(wire)
    except (NotApplicable, RingFullError) as reason:
        return Verdict.NOT_APPLICABLE, str(reason)
    except ExerciseFailed as error:
        return Verdict.NOT_RUN, f"the plain request that it needs failed for its own sake ({error.rule}): {error}"
    except RemoteError as error:
        return Verdict.FAIL, error.strerror or str(error)
    except (Failed, DeviceBroken) as error:
        return Verdict.FAIL, str(error)
    except PeerError as error:
        # EPROTO: it said something that it must not say; else it went, or is silent.
        return (Verdict.FAIL if error.errno == errno.EPROTO else Verdict.BROKE), str(error)
    except ConnectError as error:
        return Verdict.BROKE, str(error)
    return Verdict.PASS, ""


async def _lives(wire: Wire) -> bool:
    """Whether there is a listener. A server that is about to die may have taken one more connection: two tries."""
    for _ in range(2):
        try:
            async with wire.connect():
                return True
        except ConnectError:
            return False
        except (PeerError, RemoteError):
            await trio.sleep(_PAUSE)
    return True


async def _comes_back(wire: Wire) -> bool:
    with trio.move_on_after(COMES_BACK):
        while True:
            try:
                async with wire.connect():
                    return True
            except (ConnectError, PeerError, RemoteError):
                await trio.sleep(_PAUSE)
    return False
