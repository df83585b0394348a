"""PCI identities that a virtio-pci function can show: `default`, `2007` and `qemu`.

=========  ===============  ===============  =======================================================================
style      vendor:device    subsystem        a stock Linux guest
=========  ===============  ===============  =======================================================================
default    1af4:1040+id     5000:1040+id     binds by itself; its virtio bus shows vendor 0x5000 (the subsystem's)
2007       5000:1040+id     5000:1040+id     binds after ``echo 5000 1042 > /sys/bus/pci/drivers/virtio-pci/new_id``
qemu       1af4:1040+id     1af4:1100        binds by itself; Windows driver packages match it too
=========  ===============  ===============  =======================================================================

(virtio 1.4, 4.1.2; vendor 0x5000 is that of Rusty Russell's virtio draft of 2007.)
"""

from typing import Literal

from vfiouser_virtio.pci import Identity
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.ids import PCI_DEVICE_ID_BASE
from vfiouser_virtio.protocols.virtio.pci import QEMU_SUBSYSTEM_ID, VENDOR_ID, VENDOR_ID_2007

Style = Literal["default", "2007", "qemu"]

# Revision 1: "not transitional" (4.1.2.1).
_REVISION = 1


def identity(device_id: int, style: Style = "default") -> Identity:
    """What a function that carries virtio device type ``device_id`` (1 to 63) shows in config space."""
    device, known = PCI_DEVICE_ID_BASE + device_id, device_type(device_id)
    if style == "qemu":
        class_code = known.pci_class if known.qemu_pci_class is None else known.qemu_pci_class
        return Identity(VENDOR_ID, device, VENDOR_ID, QEMU_SUBSYSTEM_ID, class_code, _REVISION)
    vendor = VENDOR_ID_2007 if style == "2007" else VENDOR_ID
    return Identity(vendor, device, VENDOR_ID_2007, device, known.pci_class, _REVISION)
