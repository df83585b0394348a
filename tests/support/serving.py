"""Functions that a test has made itself, each on a socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from support.engines import current_engine

from vfiouser_virtio import VirtioPci, serve
from vfiouser_virtio.engines import Engine


@asynccontextmanager
async def serving_functions(*functions: VirtioPci, engine: Engine | None = None) -> AsyncIterator[list[dict[str, Any]]]:
    """Serve them until the end of the block; gives QEMU's ``-device`` arguments, as mappings."""
    async with serve(*functions, engine=engine or current_engine()) as served:
        yield [dict(device) for device in served.qemu_devices]
