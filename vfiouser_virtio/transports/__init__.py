"""Virtio transports: virtio-pci, and the loopback."""

from typing import TYPE_CHECKING, Any

from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.pci import VirtioPci

if TYPE_CHECKING:
    from vfiouser_virtio.transports.loopback import Loopback

__all__ = ["Loopback", "Style", "VirtioPci", "identity"]


def __getattr__(name: str) -> Any:
    if name == "Loopback":  # imported by those who use it: a server does not, and its start would be 1 % longer
        from vfiouser_virtio.transports.loopback import Loopback

        return Loopback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
