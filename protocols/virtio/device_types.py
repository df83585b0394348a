"""Table of the virtio device types: those with a declaration here, and names and ids of the others.

To add a type, add its module beside this one and its line to `DECLARED`; `device_type` says what its module is to have.
"""

from importlib import import_module

from vfiouser_virtio.protocols.virtio.device_type import DeviceType
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DECLARED: dict[int, str] = {
    DeviceId.NET: "net",
    DeviceId.BALLOON: "balloon",
    DeviceId.BLOCK: "blk",
    DeviceId.CONSOLE: "console",
    DeviceId.RNG: "rng",
    DeviceId.INPUT: "input",
}
"""Device id to name: of the module here, in `devices` and in `guest.drivers`. A test compares it with the folders."""


class _DeviceTypes(dict[int, DeviceType]):
    def __missing__(self, device_id: int) -> DeviceType:
        declared: DeviceType = import_module(f"{__package__}.{DECLARED[device_id]}").TYPE
        return self.setdefault(device_id, declared)


DEVICE_TYPES: dict[int, DeviceType] = _DeviceTypes()
"""Declarations by device id: those of `DECLARED`, each imported when it is looked up, and those that a program adds.

Only what is asked for is imported: what a server needs must not grow with the number of types.
"""

# Types without a device and a driver of ours: their PCI class, and Linux's modules for QEMU's own devices.
OTHERS: dict[int, DeviceType] = {
    DeviceId.SCSI: DeviceType("scsi", pci_class=0x010000, linux_modules=("virtio_scsi", "sd_mod", "sr_mod")),
    DeviceId.P9: DeviceType("p9", pci_class=0x018000, qemu_pci_class=0x000200, linux_modules=("9pnet_virtio", "9p")),
    DeviceId.GPU: DeviceType("gpu", pci_class=0x038000, linux_modules=("virtio_gpu",)),
    DeviceId.CLOCK: DeviceType("clock", linux_modules=("virtio_rtc",)),
    DeviceId.VSOCK: DeviceType("vsock", pci_class=0x078000, linux_modules=("vmw_vsock_virtio_transport",)),
    DeviceId.CRYPTO: DeviceType(
        "crypto", pci_class=0x108000, qemu_pci_class=0x00FF00, linux_modules=("virtio_crypto",)
    ),
    DeviceId.IOMMU: DeviceType("iommu", linux_modules=("virtio_iommu",)),
    DeviceId.MEM: DeviceType("mem", pci_class=0x050000, qemu_pci_class=0x00FF00, linux_modules=("virtio_mem",)),
    DeviceId.SOUND: DeviceType("sound", pci_class=0x040100, linux_modules=("virtio_snd",)),
    DeviceId.FS: DeviceType("fs", pci_class=0x018000, linux_modules=("virtiofs",)),
    DeviceId.PMEM: DeviceType("pmem", linux_modules=("virtio_pmem", "nd_pmem")),
    DeviceId.I2C_ADAPTER: DeviceType("i2c_adapter", linux_modules=("i2c_virtio", "i2c_dev")),
    DeviceId.CAN: DeviceType("can", linux_modules=("virtio_can", "can_raw")),
    DeviceId.BT: DeviceType("bt", linux_modules=("virtio_bt",)),
    DeviceId.GPIO: DeviceType("gpio", linux_modules=("gpio_virtio",)),
    DeviceId.SPI: DeviceType("spi", linux_modules=("spi_virtio", "spidev")),
}
"""Types without a device and a driver of ours: their PCI class, and Linux's modules for QEMU's own devices."""


def known_type(device_id: int) -> DeviceType | None:
    """The declaration of a type; None where there is none."""
    try:
        return DEVICE_TYPES[device_id]
    except KeyError:
        return None


def device_type(device_id: int) -> DeviceType:
    """What is known of a type; for an unknown one just its number."""
    known = known_type(device_id) or OTHERS.get(device_id)
    if known is not None:
        return known
    return DeviceType(DeviceId(device_id).name.lower() if device_id in {*DeviceId} else f"type {device_id}")


def declared_types() -> list[DeviceType]:
    """All declarations of `DECLARED`, by device id. Imports each module."""
    return [device_type(device_id) for device_id in sorted(DECLARED)]


def linux_aliases() -> list[tuple[str, str]]:
    """Modules that Linux does not load with a device's driver, each with the modalias: ``virtio:d00000012v*``."""
    return [(f"virtio:d{number:08X}v*", name) for number, each in _all_types() for name in each.linux_modules[1:]]


def linux_modules() -> list[str]:
    """The Linux modules of all types, sorted."""
    return sorted({name for _, each in _all_types() for name in each.linux_modules})


def _all_types() -> list[tuple[int, DeviceType]]:
    return [(number, device_type(number)) for number in sorted({*DECLARED, *OTHERS})]
