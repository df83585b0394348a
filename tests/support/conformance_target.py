"""A device of ours behind a socket, for the conformance checks."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from support.serving import serving_functions

from vfiouser_virtio import devices
from vfiouser_virtio.engines import Engine
from vfiouser_virtio.testing.conformance import Wire
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Device, Offer

DEVICES: dict[str, Callable[[], Device]] = {name: partial(devices.example, name) for name in devices.SHIPPED}
"""Every type that comes with the package."""


@asynccontextmanager
async def serving(
    name: str,
    *,
    ids: Style = "default",
    offer: Offer | None = None,
    timeout: float = 5.0,
    make: Callable[..., VirtioPci] = VirtioPci,
    engine: Engine | None = None,
) -> AsyncIterator[Wire]:
    """Serve one device until the end of the block; ``make`` is `VirtioPci`, or makes such a function."""
    async with serving_functions(make(DEVICES[name](), ids=ids, offer=offer), engine=engine) as served:
        socket = served[0]["socket"]
        assert isinstance(socket, dict)
        yield Wire(socket["path"], timeout=timeout)
