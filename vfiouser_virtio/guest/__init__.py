"""Virtio driver side in Python: enumerate a PCI function and drive its device, over any port; see `guest.ports`."""

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.guest.binding import bound, bound_pci
from vfiouser_virtio.guest.bus import VirtioBus
from vfiouser_virtio.guest.config import ByteConfig, ConfigOps, DriverConfig, TransportConfig
from vfiouser_virtio.guest.device import RING_FEATURES, VirtioDevice
from vfiouser_virtio.guest.driver import ANY, VirtioDriver, VirtioId, virtio_ids
from vfiouser_virtio.guest.drivers import (
    ALL_DRIVERS,
    BlkDriver,
    ConsoleDriver,
    ConsolePort,
    ConsolePorts,
    Disk,
    Entropy,
    EntropyDriver,
    RequestFailed,
)
from vfiouser_virtio.guest.errors import DeviceBroken, DeviceGone, FeaturesRefused, QueueFull
from vfiouser_virtio.guest.packed_virtqueue import PackedVirtqueue
from vfiouser_virtio.guest.pci import (
    BarInfo,
    CapabilityInfo,
    MsiInfo,
    MsixInfo,
    PciFunctionInfo,
    enumerate_function,
    set_command,
    set_msi,
    set_msix,
)
from vfiouser_virtio.guest.pci_driver import VirtioPciDriver
from vfiouser_virtio.guest.pci_structures import (
    VirtioLayout,
    VirtioStructure,
    locate,
    virtio_structures,
    window_read,
    window_write,
)
from vfiouser_virtio.guest.pci_transport import Interrupts, PciTransport
from vfiouser_virtio.guest.ports import DmaMemory, Ids, PciPort, Transport
from vfiouser_virtio.guest.requests import Answer, RequestQueue
from vfiouser_virtio.guest.split_virtqueue import SplitVirtqueue
from vfiouser_virtio.guest.virtqueue import Callback, DriverVirtqueue
from vfiouser_virtio.guest.virtqueues import free_vq, make_virtqueue, new_vq, resize_vq
from vfiouser_virtio.protocols.virtio.device_type import DeviceType
from vfiouser_virtio.protocols.virtio.device_types import DEVICE_TYPES, device_type

__all__ = [
    "ALL_DRIVERS",
    "ANY",
    "DEVICE_TYPES",
    "RING_FEATURES",
    "Answer",
    "BarInfo",
    "BlkDriver",
    "ByteConfig",
    "Callback",
    "CapabilityInfo",
    "ConfigOps",
    "ConsoleDriver",
    "ConsolePort",
    "ConsolePorts",
    "DeviceBroken",
    "DeviceGone",
    "DeviceType",
    "Disk",
    "DmaBuffer",
    "DmaMemory",
    "DriverConfig",
    "DriverVirtqueue",
    "Entropy",
    "EntropyDriver",
    "FeaturesRefused",
    "Ids",
    "Interrupts",
    "MsiInfo",
    "MsixInfo",
    "PackedVirtqueue",
    "PciFunctionInfo",
    "PciPort",
    "PciTransport",
    "QueueFull",
    "RequestFailed",
    "RequestQueue",
    "SplitVirtqueue",
    "Transport",
    "TransportConfig",
    "VirtioBus",
    "VirtioDevice",
    "VirtioDriver",
    "VirtioId",
    "VirtioLayout",
    "VirtioPciDriver",
    "VirtioStructure",
    "bound",
    "bound_pci",
    "device_type",
    "enumerate_function",
    "free_vq",
    "locate",
    "make_virtqueue",
    "new_vq",
    "resize_vq",
    "set_command",
    "set_msi",
    "set_msix",
    "virtio_ids",
    "virtio_structures",
    "window_read",
    "window_write",
]
