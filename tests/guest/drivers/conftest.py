"""A device with its driver over the loopback, in both kinds of memory."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from vfiouser_virtio.guest import VirtioDevice, bound
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Device, Offer

Drive = Callable[..., AbstractAsyncContextManager[VirtioDevice]]


@pytest.fixture(params=["shared", "private"])
def drive(request: pytest.FixtureRequest) -> Drive:
    @asynccontextmanager
    async def drive(device: Device, *, feature_mask: int = -1, **offer: Any) -> AsyncIterator[VirtioDevice]:
        with trio.fail_after(60):
            async with (
                Loopback(device, private=request.param == "private", offer=Offer(**offer)) as transport,
                bound(transport, feature_mask=feature_mask) as driven,
            ):
                yield driven
            free = transport.memory.unallocated
            assert free == transport.memory.size, "the driver has kept some of its memory"

    return drive
