"""vfio-user protocol 0.x (QEMU docs/interop/vfio-user.rst): header, commands, a request and a reply schema for each.

Every schema describes what follows the 16-byte `HEADER`. All of it is little-endian here: the specification says "host
endianness", and every machine this runs on is little-endian. Fields are named as in the specification and linux/vfio.h.

VERSION carries JSON (`VERSION_DATA_DEFAULTS` says what an absent key means)::

    {"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535, "pgsizes": 4096,
                      "write_multiple": true, "twin_socket": {"supported": true, "fd_index": 0}}}
"""

from enum import Enum, IntEnum, IntFlag
from typing import NamedTuple

import construct as c

from vfiouser_virtio.protocols.codec import Schema, codec


class Command(IntEnum):
    """VFIO_USER_* command numbers ("Commands")."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class MessageFlags(IntFlag):
    """``flags`` of the header ("Header"); the low four bits are the type, 0 for a request."""

    REPLY = 1 << 0
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


MESSAGE_TYPE_MASK = 0xF


class DmaMapFlags(IntFlag):
    """``flags`` of DMA_MAP (linux/vfio.h: VFIO_DMA_MAP_FLAG_*)."""

    READ = 1 << 0
    WRITE = 1 << 1


class DmaUnmapFlags(IntFlag):
    """``flags`` of DMA_UNMAP (linux/vfio.h: VFIO_DMA_UNMAP_FLAG_*); the specification uses none."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class DeviceFlags(IntFlag):
    """``flags`` of DEVICE_GET_INFO (linux/vfio.h: struct vfio_device_info)."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionFlags(IntFlag):
    """``flags`` of DEVICE_GET_REGION_INFO (linux/vfio.h: struct vfio_region_info)."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IrqInfoFlags(IntFlag):
    """``flags`` of DEVICE_GET_IRQ_INFO (linux/vfio.h: struct vfio_irq_info)."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlags(IntFlag):
    """``flags`` of DEVICE_SET_IRQS: exactly one DATA bit and one ACTION bit (linux/vfio.h: struct vfio_irq_set)."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class PciRegion(IntEnum):
    """Region indexes of a PCI device (linux/vfio.h: VFIO_PCI_*_REGION_INDEX)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class PciIrq(IntEnum):
    """Interrupt indexes of a PCI device (linux/vfio.h: VFIO_PCI_*_IRQ_INDEX)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class RegionInfoCap(IntEnum):
    """Capability ids of DEVICE_GET_REGION_INFO (linux/vfio.h: VFIO_REGION_INFO_CAP_*)."""

    SPARSE_MMAP = 1
    MSIX_MAPPABLE = 3


class IoFdType(IntEnum):
    """``type`` of a DEVICE_GET_REGION_IO_FDS sub-region."""

    IOEVENTFD = 0
    IOREGIONFD = 1


class IoEventFdFlags(IntFlag):
    """``flags`` of an ioeventfd sub-region (linux/kvm.h: KVM_IOEVENTFD_FLAG_*)."""

    DATAMATCH = 1 << 0
    PIO = 1 << 1


class DeviceFeatureFlags(IntFlag):
    """``flags`` of DEVICE_FEATURE above the 16 bits of the feature index (linux/vfio.h: VFIO_DEVICE_FEATURE_*)."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


DEVICE_FEATURE_MASK = 0xFFFF


class DeviceFeature(IntEnum):
    """Feature indexes of DEVICE_FEATURE ("Device Features")."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


class DirtyPagesFlags(IntFlag):
    """``flags`` of DIRTY_PAGES (linux/vfio.h: VFIO_IOMMU_DIRTY_PAGES_FLAG_*)."""

    START = 1 << 0
    STOP = 1 << 1
    GET_BITMAP = 1 << 2


VERSION_DATA_DEFAULTS = {
    "max_msg_fds": 1,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "write_multiple": False,
    "twin_socket": {"supported": False},
}
"""What a capability that VERSION's JSON leaves out means ("Capabilities"). QEMU 11.1 takes 8 for ``max_msg_fds``."""

HEADER = c.Struct(
    "id" / c.Int16ul,
    "command" / c.Int16ul,
    "size" / c.Int32ul,  # of the whole message, this header included
    "flags" / c.Int32ul,
    "error" / c.Int32ul,
)
EMPTY = c.Struct()

_VERSION_NUMBERS = c.Struct("major" / c.Int16ul, "minor" / c.Int16ul)
VERSION = c.Struct(*_VERSION_NUMBERS.subcons, "data" / c.GreedyBytes)  # data: JSON and a NUL, or nothing
VERSION_NUMBERS_CODEC = codec(_VERSION_NUMBERS)

DMA_MAP = c.Struct(
    "argsz" / c.Int32ul,
    "flags" / c.Int32ul,
    "offset" / c.Int64ul,  # into the fd that comes with the message
    "address" / c.Int64ul,
    "size" / c.Int64ul,
)

DMA_UNMAP = c.Struct("argsz" / c.Int32ul, "flags" / c.Int32ul, "address" / c.Int64ul, "size" / c.Int64ul)

DEVICE_INFO = c.Struct(
    "argsz" / c.Int32ul,
    "flags" / c.Int32ul,
    "num_regions" / c.Int32ul,
    "num_irqs" / c.Int32ul,
)

REGION_INFO = c.Struct(
    "argsz" / c.Int32ul,
    "flags" / c.Int32ul,
    "index" / c.Int32ul,
    "cap_offset" / c.Int32ul,  # from the start of this structure
    "size" / c.Int64ul,
    "offset" / c.Int64ul,
)
INFO_CAP_HEADER = c.Struct("id" / c.Int16ul, "version" / c.Int16ul, "next" / c.Int32ul)  # next: as cap_offset, 0 ends
REGION_INFO_REPLY = c.Struct("info" / REGION_INFO, "capabilities" / c.GreedyBytes)

SPARSE_MMAP_AREA = c.Struct("offset" / c.Int64ul, "size" / c.Int64ul)
SPARSE_MMAP = c.Struct(  # the body of capability SPARSE_MMAP, after its INFO_CAP_HEADER
    "nr_areas" / c.Rebuild(c.Int32ul, c.len_(c.this.areas)),
    c.Padding(4),
    "areas" / c.Array(c.this.nr_areas, SPARSE_MMAP_AREA),
)

REGION_IO_FDS = c.Struct(
    "argsz" / c.Int32ul,
    "flags" / c.Int32ul,
    "index" / c.Int32ul,
    "count" / c.Int32ul,
)
IOEVENTFD = c.Struct(
    "offset" / c.Int64ul,
    "size" / c.Int64ul,
    "fd_index" / c.Int32ul,
    "type" / c.Int32ul,
    "flags" / c.Int32ul,
    c.Padding(4),
    "datamatch" / c.Int64ul,
)
IOREGIONFD = c.Struct(
    "offset" / c.Int64ul,
    "size" / c.Int64ul,
    "fd_index" / c.Int32ul,
    "type" / c.Int32ul,
    "flags" / c.Int32ul,
    c.Padding(4),
    "user_data" / c.Int64ul,
)
# Both forms have `type` at the same place, so either one tells which it is.
SUB_REGION = c.Select(
    c.Struct(*IOEVENTFD.subcons, c.Check(c.this.type == IoFdType.IOEVENTFD)),
    c.Struct(*IOREGIONFD.subcons, c.Check(c.this.type == IoFdType.IOREGIONFD)),
)
REGION_IO_FDS_REPLY = c.Struct("info" / REGION_IO_FDS, "sub_regions" / c.Array(c.this.info.count, SUB_REGION))

IRQ_INFO = c.Struct("argsz" / c.Int32ul, "flags" / c.Int32ul, "index" / c.Int32ul, "count" / c.Int32ul)

IRQ_SET = c.Struct(
    "argsz" / c.Int32ul,
    "flags" / c.Int32ul,
    "index" / c.Int32ul,
    "start" / c.Int32ul,
    "count" / c.Int32ul,
)
SET_IRQS = c.Struct("set" / IRQ_SET, "data" / c.GreedyBytes)  # data: an array of bytes with DATA_BOOL, else nothing

REGION_ACCESS = c.Struct("offset" / c.Int64ul, "region" / c.Int32ul, "count" / c.Int32ul)
REGION_ACCESS_DATA = c.Struct("access" / REGION_ACCESS, "data" / c.Bytes(c.this.access.count))

# The specification's table gives DMA_WRITE's reply a 4-byte count; QEMU and libvfio-user send eight.
DMA_ACCESS = c.Struct("address" / c.Int64ul, "count" / c.Int64ul)
DMA_ACCESS_DATA = c.Struct("access" / DMA_ACCESS, "data" / c.Bytes(c.this.access.count))

WRITE_MULTI_ENTRY = c.Struct("offset" / c.Int64ul, "region" / c.Int32ul, "count" / c.Int32ul, "data" / c.Bytes(8))
WRITE_MULTI = c.Struct("wr_cnt" / c.Int64ul, "wrs" / c.Array(c.this.wr_cnt, WRITE_MULTI_ENTRY))
WRITE_MULTI_REPLY = c.Struct("wr_cnt" / c.Int64ul)

DEVICE_FEATURE_HEADER = c.Struct("argsz" / c.Int32ul, "flags" / c.Int32ul)
DEVICE_FEATURE = c.Struct("feature" / DEVICE_FEATURE_HEADER, "data" / c.GreedyBytes)
# What DEVICE_FEATURE's data is, per feature.
FEATURE_MIGRATION = c.Struct("flags" / c.Int64ul)
FEATURE_MIG_DEVICE_STATE = c.Struct("device_state" / c.Int32ul, "data_fd" / c.Int32sl)
FEATURE_DMA_LOGGING_RANGE = c.Struct("iova" / c.Int64ul, "length" / c.Int64ul)
FEATURE_DMA_LOGGING_CONTROL = c.Struct(
    "page_size" / c.Int64ul,
    "num_ranges" / c.Rebuild(c.Int32ul, c.len_(c.this.ranges)),
    c.Padding(4),
    "ranges" / c.Array(c.this.num_ranges, FEATURE_DMA_LOGGING_RANGE),
)
FEATURE_DMA_LOGGING_REPORT = c.Struct(
    "iova" / c.Int64ul,
    "length" / c.Int64ul,
    "page_size" / c.Int64ul,
    "bitmap" / c.GreedyBytes,  # only in the reply
)

MIG_DATA = c.Struct("argsz" / c.Int32ul, "size" / c.Int32ul)
MIG_DATA_DATA = c.Struct("mig" / MIG_DATA, "data" / c.Bytes(c.this.mig.size))

# Gone from the specification (DMA logging took its place), but the number is taken and old clients send it.
# linux/vfio.h: struct vfio_iommu_type1_dirty_bitmap; data is a DIRTY_BITMAP_RANGE with GET_BITMAP.
DIRTY_PAGES_HEADER = c.Struct("argsz" / c.Int32ul, "flags" / c.Int32ul)
DIRTY_PAGES = c.Struct("dirty" / DIRTY_PAGES_HEADER, "data" / c.GreedyBytes)
DIRTY_BITMAP_RANGE = c.Struct(
    "iova" / c.Int64ul,
    "size" / c.Int64ul,
    "bitmap_pgsize" / c.Int64ul,
    "bitmap_size" / c.Int64ul,
    "bitmap" / c.GreedyBytes,  # only in the reply
)


class Direction(Enum):
    """Sender of a command's request."""

    CLIENT_TO_SERVER = "client -> server"
    SERVER_TO_CLIENT = "server -> client"


class Formats(NamedTuple):
    """Payloads of one command, and who may ask."""

    request: Schema
    reply: Schema
    direction: Direction = Direction.CLIENT_TO_SERVER


COMMANDS: dict[Command, Formats] = {
    Command.VERSION: Formats(VERSION, VERSION),
    Command.DMA_MAP: Formats(DMA_MAP, EMPTY),
    Command.DMA_UNMAP: Formats(DMA_UNMAP, DMA_UNMAP),
    Command.DEVICE_GET_INFO: Formats(DEVICE_INFO, DEVICE_INFO),
    Command.DEVICE_GET_REGION_INFO: Formats(REGION_INFO, REGION_INFO_REPLY),
    Command.DEVICE_GET_REGION_IO_FDS: Formats(REGION_IO_FDS, REGION_IO_FDS_REPLY),
    Command.DEVICE_GET_IRQ_INFO: Formats(IRQ_INFO, IRQ_INFO),
    Command.DEVICE_SET_IRQS: Formats(SET_IRQS, EMPTY),
    Command.REGION_READ: Formats(REGION_ACCESS, REGION_ACCESS_DATA),
    Command.REGION_WRITE: Formats(REGION_ACCESS_DATA, REGION_ACCESS),
    Command.DMA_READ: Formats(DMA_ACCESS, DMA_ACCESS_DATA, Direction.SERVER_TO_CLIENT),
    Command.DMA_WRITE: Formats(DMA_ACCESS_DATA, DMA_ACCESS, Direction.SERVER_TO_CLIENT),
    Command.DEVICE_RESET: Formats(EMPTY, EMPTY),
    Command.DIRTY_PAGES: Formats(DIRTY_PAGES, DIRTY_PAGES),
    Command.REGION_WRITE_MULTI: Formats(WRITE_MULTI, WRITE_MULTI_REPLY),
    Command.DEVICE_FEATURE: Formats(DEVICE_FEATURE, DEVICE_FEATURE),
    Command.MIG_DATA_READ: Formats(MIG_DATA, MIG_DATA_DATA),
    Command.MIG_DATA_WRITE: Formats(MIG_DATA_DATA, EMPTY),
}

# What a server handles per access, or a client per DMA message, is read and written without construct.
HEADER_CODEC = codec(HEADER)
REGION_ACCESS_CODEC = codec(REGION_ACCESS)
HEADER_AND_REGION_ACCESS = codec(c.Struct("header" / HEADER, "access" / REGION_ACCESS))
HEADER_AND_DMA_ACCESS = codec(c.Struct("header" / HEADER, "access" / DMA_ACCESS))
