"""Kinds of devices that can be served: virtio devices, and PCI devices of an author's own; and their functions."""

from vfiouser_virtio.pci.device import PciDevice
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.virtio import Device

AnyDevice = Device | PciDevice
AnyFunction = VirtioPci | PciDeviceFunction
