"""Generic PCI endpoint function that knows nothing of virtio: build any device on it (see `PciFunction`)."""

from vfiouser_virtio.pci.bar_mapping import BarMapping
from vfiouser_virtio.pci.bars import Bar, BarKind, Bars
from vfiouser_virtio.pci.capabilities import Capability, vendor_capability
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.function import PciFunction
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.pci.intx import Intx
from vfiouser_virtio.pci.mapped_bar import mapped_bar
from vfiouser_virtio.pci.msi import Msi
from vfiouser_virtio.pci.msix import Msix

__all__ = [
    "Bar",
    "BarKind",
    "BarMapping",
    "Bars",
    "Capability",
    "ConfigSpace",
    "Identity",
    "Intx",
    "Msi",
    "Msix",
    "PciFunction",
    "mapped_bar",
    "vendor_capability",
]
