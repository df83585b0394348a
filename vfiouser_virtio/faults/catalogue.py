"""The faults that there are, by name; each is declared once, in `declarations`."""

from vfiouser_virtio.faults.declarations.configuration import CONFIGURATION
from vfiouser_virtio.faults.declarations.console import CONSOLES
from vfiouser_virtio.faults.declarations.data import DATA
from vfiouser_virtio.faults.declarations.disks import DISKS
from vfiouser_virtio.faults.declarations.input import INPUTS
from vfiouser_virtio.faults.declarations.interrupts import INTERRUPTS
from vfiouser_virtio.faults.declarations.net import NETWORKS
from vfiouser_virtio.faults.declarations.pci import PCI
from vfiouser_virtio.faults.declarations.rings import RINGS
from vfiouser_virtio.faults.declarations.status import STATUS

_ALL = (*RINGS, *DATA, *INTERRUPTS, *CONFIGURATION, *STATUS, *PCI, *DISKS, *NETWORKS, *CONSOLES, *INPUTS)
FAULTS = {fault.name: fault for fault in _ALL}
"""By name."""
