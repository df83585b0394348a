"""PCI functions that know nothing of virtio: `PciDevice` for authors, and the generic `PciFunction` below it.

The names of authors' devices, and MSI, are imported when they are first asked for: a virtio device needs none of them.
"""

from typing import TYPE_CHECKING, Any

from vfiouser_virtio.pci.bars import Bar, BarKind, Bars
from vfiouser_virtio.pci.capabilities import Capability, vendor_capability
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.function import PciFunction
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.pci.intx import Intx
from vfiouser_virtio.pci.mapped_bar import mapped_bar
from vfiouser_virtio.pci.msix import Msix

if TYPE_CHECKING:
    from vfiouser_virtio.pci.arrays import Bank, array, banks
    from vfiouser_virtio.pci.bar_mapping import BarMapping
    from vfiouser_virtio.pci.bar_memory import BarMemory
    from vfiouser_virtio.pci.bar_space import bar
    from vfiouser_virtio.pci.device import PciDevice
    from vfiouser_virtio.pci.dma import Dma, DmaFault
    from vfiouser_virtio.pci.doorbell import Doorbell
    from vfiouser_virtio.pci.extended_capabilities import (
        ExtendedCapability,
        extended_vendor_capability,
        serial_number_capability,
    )
    from vfiouser_virtio.pci.fields import field, flag
    from vfiouser_virtio.pci.fifo import Fifo
    from vfiouser_virtio.pci.irq import Irq, interrupts
    from vfiouser_virtio.pci.msi import Msi
    from vfiouser_virtio.pci.register import Register

__all__ = [
    "Bank",
    "Bar",
    "BarKind",
    "BarMapping",
    "BarMemory",
    "Bars",
    "Capability",
    "ConfigSpace",
    "Dma",
    "DmaFault",
    "Doorbell",
    "ExtendedCapability",
    "Fifo",
    "Identity",
    "Intx",
    "Irq",
    "Msi",
    "Msix",
    "PciDevice",
    "PciFunction",
    "Register",
    "array",
    "banks",
    "bar",
    "extended_vendor_capability",
    "field",
    "flag",
    "interrupts",
    "mapped_bar",
    "serial_number_capability",
    "vendor_capability",
]

_HOMES = {
    "arrays": ("Bank", "array", "banks"),
    "bar_mapping": ("BarMapping",),
    "bar_memory": ("BarMemory",),
    "bar_space": ("bar",),
    "device": ("PciDevice",),
    "dma": ("Dma", "DmaFault"),
    "doorbell": ("Doorbell",),
    "extended_capabilities": ("ExtendedCapability", "extended_vendor_capability", "serial_number_capability"),
    "fields": ("field", "flag"),
    "fifo": ("Fifo",),
    "irq": ("Irq", "interrupts"),
    "msi": ("Msi",),
    "register": ("Register",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
