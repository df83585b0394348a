"""Checks of network devices: ours keep every rule, and each fault is seen by its own check, and by no other."""

import functools

import pytest
from support import broken_net, broken_net_peer, broken_net_tunnel  # noqa: F401 - all fill the table
from support.broken import BROKEN, made_with
from support.conformance_target import OF_A_JUMPING_CLOCK, serving, serving_on_a_hub
from support.spoilt_net import ERR, Kind, SpoiltNet
from trio.testing import MockClock

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.protocols.virtio.net import CtrlClass, CtrlMq
from vfiouser_virtio.testing.conformance import CHECKS, GOOD, Check, Verdict, run_check
from vfiouser_virtio.testing.conformance.checks import NET, PEER
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Offer

pytestmark = pytest.mark.slow

NET_CHECKS = [name for name, check in CHECKS.items() if NET in check.needs]
NEIGHBOURS = 2
"""Other checks of the same group that look at each fault; all do in a ``variant``."""


def groups() -> dict[str, list[str]]:
    """The checks by their two letters, those of one device apart from those that need a peer."""
    found: dict[str, list[str]] = {}
    for name in NET_CHECKS:
        found.setdefault(name[:11] + str(PEER in CHECKS[name].needs), []).append(name)
    return found


def neighbours(name: str) -> list[Check]:
    """The next ones of a check's group, in a circle."""
    [group] = [each for each in groups().values() if name in each]
    at = group.index(name)
    return [CHECKS[each] for each in (group[at + 1 :] + group[:at])[:NEIGHBOURS]]


# The first one's rules are kept in `test_conformance.test_our_devices`, too, but for those of traffic.
@pytest.mark.parametrize(("ids", "packed"), [pytest.param("default", False, marks=pytest.mark.variant), ("2007", True)])
async def test_our_network_device_keeps_every_rule(ids: Style, packed: bool, autojump_clock: MockClock) -> None:
    async with serving_on_a_hub(ids=ids, offer=Offer(packed=packed)) as wire:
        results = [await run_check(wire, CHECKS[name]) for name in NET_CHECKS]
    assert [result for result in results if result.verdict is not Verdict.PASS] == []


async def test_without_a_peer_the_checks_of_traffic_do_not_apply(autojump_clock: MockClock) -> None:
    """And every other one does."""
    async with serving("net") as wire:
        results = [await run_check(wire, CHECKS[name]) for name in NET_CHECKS]
    absent = {result.check_id for result in results if result.verdict is Verdict.NOT_APPLICABLE}
    assert absent == {name for name in NET_CHECKS if PEER in CHECKS[name].needs}
    assert len(set(NET_CHECKS) - absent) >= 30
    assert all(result.verdict in GOOD for result in results)


async def test_a_peer_that_is_no_network_device(autojump_clock: MockClock) -> None:
    async with serving_on_a_hub() as wire, serving("rng") as other:
        wire = functools.partial(type(wire), wire.path, timeout=wire.timeout)(peer=other.path)
        result = await run_check(wire, CHECKS["virtio14/NR1"])
    assert result.verdict is Verdict.NOT_APPLICABLE
    assert result.detail == "needs a peer that is a network device"


# ---- what a device may do --------------------------------------------------------------------------------------------


class KeepsItsStatistics(SpoiltNet):
    def reset(self) -> None:
        settings = self.control.settings
        before = settings.command_num, settings.ok_num
        super().reset()
        settings.command_num, settings.ok_num = before


async def test_statistics_may_outlive_a_reset(autojump_clock: MockClock) -> None:
    async with serving_on_a_hub(make=made_with(KeepsItsStatistics)) as wire:
        verdicts = [(await run_check(wire, CHECKS["virtio14/NS5"])).verdict for _ in range(2)]
    assert verdicts == [Verdict.PASS] * 2


class RefusesHashConfig(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return ERR if kind == (CtrlClass.MQ, CtrlMq.HASH_CONFIG) else super().perform(kind, data, room)


@pytest.mark.parametrize("name", ["NH3", "NH4"])
async def test_a_device_with_rss_need_not_take_hash_config(name: str, autojump_clock: MockClock) -> None:
    async with serving_on_a_hub(make=made_with(RefusesHashConfig)) as wire:
        result = await run_check(wire, CHECKS[f"virtio14/{name}"])
    assert result.verdict is Verdict.NOT_APPLICABLE


class HasAShortMtu(SpoiltNet):
    def spoil(self) -> None:
        self.config.set(mtu=1500)

    def receives(self, frame: Frame) -> Frame | None:
        return frame if frame.length <= 1514 else None


class DropsWhatIsNotComplete(SpoiltNet):
    def sends(self, frame: Frame) -> Frame | None:
        return frame if frame.offload is None else None


async def test_a_peer_may_have_a_smaller_mtu(autojump_clock: MockClock) -> None:
    async with serving_on_a_hub(peer_net=HasAShortMtu) as wire:
        result = await run_check(wire, CHECKS["virtio14/NX7"])
    assert result.verdict is Verdict.PASS, result


@pytest.mark.parametrize("name", ["NR4-sum", "NR5", "NR6", "NR6-hdr-len", "NR7"])
async def test_what_a_peer_loses_says_nothing_of_the_device(name: str, autojump_clock: MockClock) -> None:
    async with serving_on_a_hub(peer_net=DropsWhatIsNotComplete, timeout=OF_A_JUMPING_CLOCK) as wire:
        result = await run_check(wire, CHECKS[f"virtio14/{name}"])
    assert result.verdict is Verdict.NOT_RUN, result


@pytest.mark.parametrize("name", NET_CHECKS)
async def test_no_other_check_sees_the_fault(name: str, autojump_clock: MockClock) -> None:
    """Two of the neighbours are asked, of which the ones that see it, too, are known."""
    await _only_its_own_check_sees(name, neighbours(name))


async def _only_its_own_check_sees(name: str, others: list[Check]) -> None:
    broken = BROKEN[name]
    async with serving_on_a_hub(offer=broken.offer, timeout=OF_A_JUMPING_CLOCK, make=broken.make) as wire:
        results = [await run_check(wire, check) for check in others]
    silent = {Verdict.PASS, Verdict.NOT_APPLICABLE}
    seen = {result.check_id: result.detail for result in results if result.verdict not in silent}
    assert {*seen} <= {*broken.also}, seen
