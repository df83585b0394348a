"""Functions that a test has made itself, each on a socket: `vfiouser_virtio.serving.serve` makes them from options."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import trio
from support.engines import current_engine

from vfiouser_virtio.engines import engine as choose_engine
from vfiouser_virtio.transports import VirtioPci


@asynccontextmanager
async def serving_functions(*functions: VirtioPci) -> AsyncIterator[list[dict[str, Any]]]:
    """Serve them until the end of the block; gives QEMU's ``-device`` arguments, as mappings."""
    failure: Exception | None = None
    engine = choose_engine(current_engine())
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        devices: list[dict[str, object]] = []
        async with trio.open_nursery() as nursery:
            for number, function in enumerate(functions):
                path = f"{folder}/{number}.sock"
                nursery.start_soon(function.serve)
                listener = engine.listen(path)
                stack.enter_context(listener)
                engine.open(listener)
                nursery.start_soon(engine.serve, function, listener)
                devices.append({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": path}})
            try:
                yield devices
            except Exception as error:  # raised again below, outside of an ExceptionGroup
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
