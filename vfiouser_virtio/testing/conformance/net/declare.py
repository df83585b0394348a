"""Declaration of checks of network devices: of one alone, and of one with a peer on its network."""

from collections.abc import Awaitable, Callable, Sequence
from functools import wraps

from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import MUST, NET, PEER, Keyword, Need, check, offers
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable

OneDevice = Callable[[ConformanceDriver], Awaitable[None]]
TwoDevices = Callable[[ConformanceDriver, ConformanceDriver], Awaitable[None]]
"""A check that gets the device under test, and its peer."""


def net_check(
    check_id: str,
    *,
    section: str,
    observe: str,
    keyword: Keyword = MUST,
    features: Sequence[NetFeature] = (),
    needs: Sequence[Need] = (),
) -> Callable[[OneDevice], OneDevice]:
    """Register a check of a network device that offers ``features``; ``section`` is one of its chapter."""

    def register(function: OneDevice) -> OneDevice:
        @wraps(function)
        async def run(bench: Bench) -> None:
            await function(ConformanceDriver(bench))

        _register(check_id, section, observe, keyword, _needs(features, *needs), run)
        return function

    return register


def peer_check(
    check_id: str,
    *,
    section: str,
    observe: str,
    keyword: Keyword = MUST,
    features: Sequence[NetFeature] = (),
    peer_features: Sequence[NetFeature] = (),
) -> Callable[[TwoDevices], TwoDevices]:
    """Register a check for which frames come from, or go to, a second device, which offers ``peer_features``."""

    def register(function: TwoDevices) -> TwoDevices:
        @wraps(function)
        async def run(bench: Bench) -> None:
            async with Bench.open(bench.wire.at_peer()) as other:
                if other.device_type != DeviceId.NET:
                    raise NotApplicable("needs a peer that is a network device")
                if mask_of(peer_features) & ~other.offered:
                    names = ", ".join(each.name for each in peer_features if each.mask & ~other.offered)
                    raise NotApplicable(f"needs a peer that offers {names}")
                await function(ConformanceDriver(bench), ConformanceDriver(other))

        _register(check_id, section, observe, keyword, _needs(features, PEER), run)
        return function

    return register


def _needs(features: Sequence[NetFeature], *more: Need) -> list[Need]:
    return [NET, *([offers(*features)] if features else []), *more]


def _register(
    check_id: str,
    section: str,
    observe: str,
    keyword: Keyword,
    needs: Sequence[Need],
    run: Callable[[Bench], Awaitable[None]],
) -> None:
    check(
        check_id,
        section=f"Network Device / {section}",
        keyword=keyword,
        observe=observe,
        needs=needs,
        device_type=DeviceId.NET,
    )(run)
