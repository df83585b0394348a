"""Kinds of devices that can be served: virtio devices, and PCI devices of an author's own; and their functions.

For annotations: what is no virtio device is one of an author's own, so that a server of the former does without the
modules of the latter.
"""

from typing import TYPE_CHECKING, TypeAlias

from vfiouser_virtio.transports.served_function import ServedFunction

if TYPE_CHECKING:
    from vfiouser_virtio.pci.device import PciDevice
    from vfiouser_virtio.transports.pci import VirtioPci
    from vfiouser_virtio.transports.pci_device import PciDeviceFunction
    from vfiouser_virtio.virtio import Device

    AnyDevice: TypeAlias = Device | PciDevice
    AnyFunction: TypeAlias = VirtioPci | PciDeviceFunction


def device_of(served: "AnyDevice | AnyFunction") -> "AnyDevice":
    """The device, also where it is on its function already."""
    return served.device if isinstance(served, ServedFunction) else served
