"""vfio-user protocol (QEMU docs/interop/vfio-user.rst), with trio: `server` serves a device, `client` drives one.

Both have `wire` below them, and know nothing of each other. The names of both are here, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vfiouser_virtio.vfio_user.server import *  # noqa: F403 - each name once, in `server`
from vfiouser_virtio.vfio_user.wire.connection import Message as Message
from vfiouser_virtio.vfio_user.wire.connection import Trace as Trace

if TYPE_CHECKING:
    from vfiouser_virtio.vfio_user.client import *  # noqa: F403 - likewise
else:

    def __getattr__(name: str) -> object:
        # What drives a server is imported when it is first asked for: those modules are a tenth of a server's start.
        client = import_module(f"{__name__}.client")
        if name not in client.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(client, name)
        return value
