"""Bindings of libvfio-user's public API through ctypes: `load` the library, make a `Context`, be a PCI device.

It is of use without the rest of this package; docs/libvfio-user.md has a whole device in forty lines. Names are those
of libvfio-user.h without their prefix; errors are OSError. Protocol numbers and PCI structures are in
`vfiouser_virtio.protocols`.
"""

from vfiouser_virtio.libvfio_user.bindings.constants import (
    DEV_NUM_IRQS,
    GENERIC_DEV_MIGR_REGION_IDX,
    GENERIC_DEV_NUM_REGIONS,
    LIB_VFIO_USER_MAJOR,
    LIB_VFIO_USER_MINOR,
    MAX_DMA_REGIONS,
    MIGR_CALLBACKS_VERS,
    PCI_DEV_NUM_REGIONS,
    CapFlag,
    CtxFlag,
    DevIrqType,
    DevType,
    LogLevel,
    MigrState,
    PciDevRegion,
    PciType,
    RegionFlag,
    ResetType,
    SglFlag,
    Trans,
)
from vfiouser_virtio.libvfio_user.bindings.context import Context
from vfiouser_virtio.libvfio_user.bindings.dma import Sgl
from vfiouser_virtio.libvfio_user.bindings.handle import HasFunctions
from vfiouser_virtio.libvfio_user.bindings.library import ENVIRONMENT, Library, load
from vfiouser_virtio.libvfio_user.bindings.migration import Migration
from vfiouser_virtio.libvfio_user.bindings.prototypes import PROTOTYPES, Functions
from vfiouser_virtio.libvfio_user.bindings.region import Access
from vfiouser_virtio.libvfio_user.bindings.types import DmaInfo, DmaInfoStruct, Iovec, MigrationCallbacks

__all__ = [
    "DEV_NUM_IRQS",
    "ENVIRONMENT",
    "GENERIC_DEV_MIGR_REGION_IDX",
    "GENERIC_DEV_NUM_REGIONS",
    "LIB_VFIO_USER_MAJOR",
    "LIB_VFIO_USER_MINOR",
    "MAX_DMA_REGIONS",
    "MIGR_CALLBACKS_VERS",
    "PCI_DEV_NUM_REGIONS",
    "PROTOTYPES",
    "Access",
    "CapFlag",
    "Context",
    "CtxFlag",
    "DevIrqType",
    "DevType",
    "DmaInfo",
    "DmaInfoStruct",
    "Functions",
    "HasFunctions",
    "Iovec",
    "Library",
    "LogLevel",
    "MigrState",
    "Migration",
    "MigrationCallbacks",
    "PciDevRegion",
    "PciType",
    "RegionFlag",
    "ResetType",
    "Sgl",
    "SglFlag",
    "Trans",
    "load",
]
