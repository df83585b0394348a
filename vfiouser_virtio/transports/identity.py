"""The three identities that a virtio-pci function can show: `default`, `2007` and `qemu`.

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
from vfiouser_virtio.protocols.virtio.ids import PCI_DEVICE_ID_BASE, DeviceId
from vfiouser_virtio.protocols.virtio.pci import QEMU_SUBSYSTEM_ID, VENDOR_ID, VENDOR_ID_2007

Style = Literal["default", "2007", "qemu"]

# PCI class codes by what a device is (pci_ids.h); the rest are "unclassified, other".
_OTHER = 0x00FF00
_CLASS_CODES = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x018000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.SCSI: 0x010000,
    DeviceId.P9: 0x018000,
    DeviceId.GPU: 0x038000,
    DeviceId.INPUT: 0x098000,
    DeviceId.VSOCK: 0x078000,
    DeviceId.CRYPTO: 0x108000,
    DeviceId.SOUND: 0x040100,
    DeviceId.FS: 0x018000,
    DeviceId.MEM: 0x050000,
}
# Where QEMU's own devices say something else.
_QEMU_CLASS_CODES = {DeviceId.BLOCK: 0x010000, DeviceId.P9: 0x000200, DeviceId.CRYPTO: _OTHER, DeviceId.MEM: _OTHER}
# Revision 1: "not transitional" (4.1.2.1).
_REVISION = 1


def identity(device_id: int, style: Style = "default") -> Identity:
    """What a function that carries virtio device type ``device_id`` (1 to 63) shows in config space."""
    device = PCI_DEVICE_ID_BASE + device_id
    class_code = _CLASS_CODES.get(DeviceId(device_id), _OTHER) if device_id in set(DeviceId) else _OTHER
    if style == "qemu":
        class_code = _QEMU_CLASS_CODES.get(DeviceId(device_id), class_code) if device_id in set(DeviceId) else _OTHER
        return Identity(VENDOR_ID, device, VENDOR_ID, QEMU_SUBSYSTEM_ID, class_code, _REVISION)
    vendor = VENDOR_ID_2007 if style == "2007" else VENDOR_ID
    return Identity(vendor, device, VENDOR_ID_2007, device, class_code, _REVISION)
