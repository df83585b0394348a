"""Functions that a test has made itself, each on a socket: `vfiouser_virtio.cli.serving` makes them from options."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_user import Server, listen_path


@asynccontextmanager
async def serving_functions(*functions: VirtioPci) -> AsyncIterator[list[dict[str, object]]]:
    """Serve them until the end of the block; gives QEMU's ``-device`` arguments, as mappings."""
    failure: Exception | None = None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        devices: list[dict[str, object]] = []
        async with trio.open_nursery() as nursery:
            for number, function in enumerate(functions):
                path = f"{folder}/{number}.sock"
                nursery.start_soon(function.serve)
                nursery.start_soon(Server(function).serve, stack.enter_context(listen_path(path)))
                devices.append({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": path}})
            try:
                yield devices
            except Exception as error:  # raised again below, outside of an ExceptionGroup
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
