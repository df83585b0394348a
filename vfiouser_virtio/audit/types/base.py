"""Base of the watches of requests: what a device has of its driver."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule
from vfiouser_virtio.virtio import DeviceCore


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

    def available(self, chain: SeenChain) -> None:
        """See `ChainWatch`."""

    def used(self, queue: int, head: int) -> None:
        """See `ChainWatch`."""

    def reset(self) -> None:
        """The driver resets the device."""

    def queue_reset(self, queue: int) -> None:
        """See `ChainWatch`."""
