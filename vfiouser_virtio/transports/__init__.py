"""What carries a child device of the virtio bus to a driver: virtio-pci."""

from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.pci import VirtioPci

__all__ = ["Style", "VirtioPci", "identity"]
