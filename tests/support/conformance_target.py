"""A device of ours behind a socket, for the conformance checks."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from support.serving import serving_functions
from support.spoilt_net import TUNNELS

from vfiouser_virtio import devices
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.engines import Engine
from vfiouser_virtio.testing.conformance import Wire
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Device, Offer

DEVICES: dict[str, Callable[[], Device]] = {name: partial(devices.example, name) for name in devices.SHIPPED}
"""Every type that comes with the package."""
OF_A_JUMPING_CLOCK = 0.25
"""Seconds for an answer by a clock that jumps when all tasks wait (trio's ``autojump_clock``): one that does not come
then never comes, and one that comes is in time however slow the machine is."""
_HUB = "conformance"


@asynccontextmanager
async def serving(
    name: str,
    *,
    ids: Style = "default",
    offer: Offer | None = None,
    timeout: float = 60.0,
    make: Callable[..., VirtioPci] = VirtioPci,
    engine: Engine | None = None,
) -> AsyncIterator[Wire]:
    """Serve one device until the end of the block; ``make`` is `VirtioPci`, or makes such a function."""
    async with serving_functions(make(DEVICES[name](), ids=ids, offer=offer), engine=engine) as served:
        socket = served[0]["socket"]
        assert isinstance(socket, dict)
        yield Wire(socket["path"], timeout=timeout)


@asynccontextmanager
async def serving_on_a_hub(
    *,
    ids: Style = "default",
    offer: Offer | None = None,
    timeout: float = 60.0,
    make: Callable[..., VirtioPci] = VirtioPci,
    engine: Engine | None = None,
    peer_net: Callable[[HubNetdev], Net] = lambda netdev: Net(netdev=netdev, **TUNNELS),
) -> AsyncIterator[Wire]:
    """Serve two network devices of one network, of which the first is made by ``make``; the other one is its peer."""
    under_test = make(a_net(HubNetdev(hub=_HUB)), ids=ids, offer=offer)
    peer = VirtioPci(peer_net(HubNetdev(hub=_HUB)), ids=ids, offer=offer, name="peer")
    async with serving_functions(under_test, peer, engine=engine) as served:
        paths = [each["socket"]["path"] for each in served]
        yield Wire(paths[0], timeout=timeout, peer=paths[1])


def a_net(netdev: Netdev) -> Net:
    """As the example of the package, which offers everything, but on a network."""
    return Net(netdev=netdev, queues=2, mtu=9000, speed=10_000, hash=True, **TUNNELS)
