"""Constants of libvfio-user.h, names as there without ``VFU_``; numbers of the protocol itself are `protocols`'."""

from enum import IntEnum, IntFlag

from vfiouser_virtio.protocols.vfio_user import PciIrq, PciRegion

LIB_VFIO_USER_MAJOR = 0
LIB_VFIO_USER_MINOR = 2
"""The version that the header claims. It has not changed since 2022 and says nothing about the ABI."""

MAX_DMA_REGIONS = 1_000_000
"""The library's default for how many DMA regions a client may have (LIBVFIO_USER_MAX_DMA_REGIONS)."""

MIGR_CALLBACKS_VERS = 2
"""The only version of `types.MigrationCallbacks` there is (VFU_MIGR_CALLBACKS_VERS)."""

GENERIC_DEV_MIGR_REGION_IDX = 0
GENERIC_DEV_NUM_REGIONS = 1

DevIrqType = PciIrq
"""VFU_DEV_*_IRQ: the protocol's own interrupt indexes."""

DEV_NUM_IRQS = 5

PciDevRegion = PciRegion
"""VFU_PCI_DEV_*_REGION_IDX: the protocol's own region indexes."""

PCI_DEV_NUM_REGIONS = 9


class Trans(IntEnum):
    """vfu_trans_t: PIPE (stdin and stdout) exists only in builds for the library's own tests."""

    SOCK = 0
    PIPE = 1


class DevType(IntEnum):
    """vfu_dev_type_t."""

    PCI = 0


class CtxFlag(IntFlag):
    """LIBVFIO_USER_FLAG_*: attach and run return at once when there is nothing to do."""

    ATTACH_NB = 1 << 0


class RegionFlag(IntFlag):
    """VFU_REGION_FLAG_*: without MEM a BAR is I/O ports; ALWAYS_CB hands all of config space to the callback."""

    READ = 1 << 0
    WRITE = 1 << 1
    RW = READ | WRITE
    MEM = 1 << 2
    ALWAYS_CB = 1 << 3
    BITS_64 = 1 << 4  # VFU_REGION_FLAG_64_BITS
    PREFETCH = 1 << 5


class ResetType(IntEnum):
    """vfu_reset_type_t: why the device must be reset. After LOST_CONN the client is gone."""

    DEVICE = 0
    LOST_CONN = 1
    PCI_FLR = 2


class MigrState(IntEnum):
    """vfu_migr_state_t, which is numbered otherwise than the protocol's device_state."""

    STOP = 0
    RUNNING = 1
    STOP_AND_COPY = 2
    PRE_COPY = 3
    RESUME = 4


class SglFlag(IntFlag):
    """VFU_SGL_*: with DIRECT_ACCESS memory with an fd is copied, not asked for by message (since 5d64ebf)."""

    DIRECT_ACCESS = 1 << 0


class PciType(IntEnum):
    """vfu_pci_type_t: PCI_X_2 and EXPRESS have 4096 bytes of config space, the others 256."""

    CONVENTIONAL = 0
    PCI_X_1 = 1
    PCI_X_2 = 2
    EXPRESS = 3


class CapFlag(IntFlag):
    """VFU_CAP_FLAG_*: CALLBACK hands accesses of the capability to the callback of the config region."""

    EXTENDED = 1 << 0
    CALLBACK = 1 << 1
    READONLY = 1 << 2


class LogLevel(IntEnum):
    """LOG_* of syslog.h, which the library's log uses."""

    EMERG = 0
    ALERT = 1
    CRIT = 2
    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7
