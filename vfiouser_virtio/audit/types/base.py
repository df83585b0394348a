"""Base of the watches of requests: what a device has of its driver."""

from typing import Protocol, runtime_checkable

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule
from vfiouser_virtio.virtio import DeviceCore


@runtime_checkable
class _Counted(Protocol):
    """Queue whose buffers are counted: `AuditedVirtqueue`."""

    def waiting(self) -> int: ...


class RequestWatch:
    """Watch of the requests of one device; a `ChainWatch` that sees nothing."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        self.core = core
        self._findings = findings

    def broke(self, rule: Rule, seen: str) -> None:
        """See `Findings.broke`."""
        self._findings.broke(rule, seen)

    def accepted(self, feature: int) -> bool:
        """Whether the driver has accepted this feature bit."""
        return bool(self.core.driver_features >> feature & 1)

    def config(self, field: str, otherwise: int) -> int:
        """A field of the device's configuration; ``otherwise`` for a device whose author has left it out."""
        try:
            value = self.core.device.config[field]
        except KeyError:
            return otherwise
        return value if isinstance(value, int) else otherwise

    def waiting(self, queue: int) -> int:
        """Buffers of a queue that the driver has made available, and that have not been taken; that many at most."""
        found = self.core.queues[queue]
        return found.waiting() if isinstance(found, _Counted) else found.size

    def available(self, chain: SeenChain) -> None:
        """See `ChainWatch`."""

    def used(self, queue: int, head: int) -> None:
        """See `ChainWatch`."""

    def reset(self) -> None:
        """The driver resets the device."""

    def queue_reset(self, queue: int) -> None:
        """See `ChainWatch`."""
