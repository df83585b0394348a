"""What carries a child device of the virtio bus to a driver: virtio-pci, and the loopback."""

from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.loopback import Loopback
from vfiouser_virtio.transports.pci import VirtioPci

__all__ = ["Loopback", "Style", "VirtioPci", "identity"]
