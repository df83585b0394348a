"""Conformance check: a coroutine with its rule, its section, and how it observes whether the rule is kept.

::

    @check("virtio14/RS1", section="Device Reset", keyword=MUST, observe="write 0, poll until status reads 0")
    async def rs1(bench: Bench) -> None:
        '''A reset sets device_status to 0.'''          # the rule, as the report and the list show it
        ...
        expect(status == 0, f"status is {status:#x} …")

Each check runs on a connection of its own. It returns (pass), raises `Failed`, or `NotApplicable` with the reason.
`wire_check` is for rules below virtio: its function makes its own connection.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vfiouser_virtio.protocols.virtio.features import FeatureBit, mask_of
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable
from vfiouser_virtio.testing.conformance.wire import Wire

Keyword: TypeAlias = Literal["MUST", "SHOULD", "advice"]
MUST: Keyword = "MUST"
SHOULD: Keyword = "SHOULD"
ADVICE: Keyword = "advice"
"""No specification says so, and no server fails for it."""


@dataclass(frozen=True, slots=True)
class Need:
    """Precondition of a check on the device; ``text`` completes "needs …"."""

    text: str
    is_met: Callable[[Bench], bool]


def offers(*features: FeatureBit) -> Need:
    """The device offers all of these features."""
    mask = mask_of(features)
    names = " and ".join(feature.name for feature in features)
    return Need(f"{names} offered", lambda bench: bench.offered & mask == mask)


EXERCISE = Need("a device type that can be exercised", lambda bench: bench.exercise is not None)
READS = Need("requests that the device reads", lambda bench: bool(bench.exercise and bench.exercise.readable))
WRITES = Need("requests that the device writes to", lambda bench: bool(bench.exercise and bench.exercise.writable))
MSIX = Need("MSI-X", lambda bench: bench.info.msix is not None)
INTX = Need("an INTx pin", lambda bench: bench.info.interrupt_pin != 0)
NET = Need("a network device", lambda bench: bench.device_type == DeviceId.NET)
PEER = Need("a second one on its network (--peer)", lambda bench: bench.wire.peer is not None)
CONFIG = Need("device-specific configuration", lambda bench: bench.layout.device is not None)


@dataclass(frozen=True, slots=True)
class Check:
    """Rule of a specification, and how to see whether a server keeps it."""

    id: str
    section: str
    """Where the rule stands: a label of the specification."""
    keyword: Keyword
    rule: str
    observe: str
    needs: tuple[Need, ...]
    run: Callable[[Wire], Awaitable[None]]
    """Returns when the rule is kept; raises Failed, NotApplicable, or what breaks when the server does."""


CHECKS: dict[str, Check] = {}
"""All checks by id, in the order in which they run."""


def wire_check(
    check_id: str, *, section: str, keyword: Keyword = MUST, observe: str
) -> Callable[[Callable[[Wire], Awaitable[None]]], Callable[[Wire], Awaitable[None]]]:
    """Register a check of the vfio-user protocol, which makes its own connections."""

    def register(function: Callable[[Wire], Awaitable[None]]) -> Callable[[Wire], Awaitable[None]]:
        _register(Check(check_id, section, keyword, _rule(function), observe, (), function))
        return function

    return register


def check(
    check_id: str,
    *,
    section: str,
    keyword: Keyword = MUST,
    observe: str,
    needs: Sequence[Need] = (),
    device_type: DeviceId | None = None,
) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[Bench], Awaitable[None]]]:
    """Register a check of a virtio function: it gets a `Bench`, with the device found and reset.

    ``device_type``: the first of its ``needs`` is a device of this type. Where an earlier check has seen that it is of
    another one, there is no connection.
    """

    def register(function: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
        async def run(wire: Wire) -> None:
            if device_type is not None and wire.found.get("device_type", device_type) != device_type:
                raise NotApplicable(f"needs {needs[0].text}")
            async with Bench.open(wire) as bench:
                for need in needs:
                    if not need.is_met(bench):
                        raise NotApplicable(f"needs {need.text}")
                await function(bench)

        _register(Check(check_id, section, keyword, _rule(function), observe, tuple(needs), run))
        return function

    return register


def _register(new: Check) -> None:
    assert new.id not in CHECKS, new.id
    CHECKS[new.id] = new


def _rule(function: Callable[..., object]) -> str:
    assert function.__doc__, f"{function} does not say its rule"
    return " ".join(function.__doc__.split())
