"""Virtio over PCI (virtio 1.4, 4.1): capabilities, common configuration, ISR status; names of linux/virtio_pci.h."""

from enum import IntEnum, IntFlag

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import offsets

VENDOR_ID = 0x1AF4
# The vendor of Rusty Russell's 2007 draft (PCI_VENDOR_ID_VIRTIO): also our subsystem vendor.
VENDOR_ID_2007 = 0x5000
# What QEMU shows as subsystem of its modern virtio devices.
QEMU_SUBSYSTEM_ID = 0x1100
NO_VECTOR = 0xFFFF


class CfgType(IntEnum):
    """``cfg_type`` of a vendor capability (4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5
    SHARED_MEMORY = 8
    VENDOR = 9


class Isr(IntFlag):
    """Bits of the ISR status byte (4.1.4.5)."""

    QUEUE = 1
    CONFIG = 2


# struct virtio_pci_cap without cap_vndr and cap_next, which the capability chain writes (4.1.4).
CAP_BODY = Struct(
    "cap_len" / Int8ul,
    "cfg_type" / Int8ul,
    "bar" / Int8ul,
    "id" / Int8ul,
    "padding" / Bytes(2),
    "offset" / Int32ul,
    "length" / Int32ul,
)
CAP = Struct("cap_vndr" / Int8ul, "cap_next" / Int8ul, *CAP_BODY.subcons)
NOTIFY_CAP = Struct(*CAP.subcons, "notify_off_multiplier" / Int32ul)
CAP64 = Struct(*CAP.subcons, "offset_hi" / Int32ul, "length_hi" / Int32ul)
CFG_CAP = Struct(*CAP.subcons, "pci_cfg_data" / Bytes(4))

# struct virtio_pci_common_cfg (4.1.4.3): 64 bytes, the last eight behind features 39, 40 and 41.
COMMON_CFG = Struct(
    "device_feature_select" / Int32ul,
    "device_feature" / Int32ul,
    "driver_feature_select" / Int32ul,
    "driver_feature" / Int32ul,
    "config_msix_vector" / Int16ul,
    "num_queues" / Int16ul,
    "device_status" / Int8ul,
    "config_generation" / Int8ul,
    "queue_select" / Int16ul,
    "queue_size" / Int16ul,
    "queue_msix_vector" / Int16ul,
    "queue_enable" / Int16ul,
    "queue_notify_off" / Int16ul,
    "queue_desc" / Int64ul,
    "queue_driver" / Int64ul,
    "queue_device" / Int64ul,
    "queue_notif_config_data" / Int16ul,
    "queue_reset" / Int16ul,
    "admin_queue_index" / Int16ul,
    "admin_queue_num" / Int16ul,
)
COMMON_CFG_OFFSETS = offsets(COMMON_CFG)
COMMON_CFG_SIZE = COMMON_CFG.sizeof()
