"""Options of a vfio-user client: negotiation, timeouts, and faults on its way."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vfiouser_virtio.vfio_user.client.chaos import Chaos
from vfiouser_virtio.vfio_user.client.version import QEMU_VERSION, SPDK_VERSION, VersionProposal
from vfiouser_virtio.vfio_user.wire.connection import Trace

TIMEOUT = 5.0
"""Seconds that QEMU waits for a reply (``x-msg-timeout``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Options of a client."""

    version: VersionProposal | None = field(default_factory=VersionProposal)
    """None: nothing is negotiated, and no memory mapped, before the block starts."""
    timeout: float = TIMEOUT
    """Seconds to wait for each reply."""
    strict: bool = False
    """Whether what QEMU does not survive is an error here, too: see `Requests.match`."""
    next_id: Callable[[], int] | None = None
    """The id of the next message, 16 bits; None counts from 0."""
    chaos: Chaos | None = None
    trace: Trace | None = None
    """Is called with every message, either way, before any chaos; its body is only valid during the call."""
    name: str = ""
    """For messages; by default the path of the socket."""


QEMU_OPTIONS = ClientOptions(version=QEMU_VERSION, strict=True)
"""Negotiates as QEMU 11.1 does, and is as easily put out of step."""

SPDK_OPTIONS = ClientOptions(version=SPDK_VERSION, next_id=lambda: 0)
"""Negotiates as SPDK's userspace driver does, and gives all messages the id 0."""
