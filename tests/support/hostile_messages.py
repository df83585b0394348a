"""Payloads of vfio-user messages that attacks are made of."""

from support.hostile import Attack

from vfiouser_virtio.protocols.pci import CapId
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, DMA_UNMAP, IRQ_SET, REGION_ACCESS, IrqSetFlags, PciRegion
from vfiouser_virtio.protocols.virtio.pci import CfgType

EVENTFDS = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER)


def dma_map(address: int, size: int, *, offset: int = 0, flags: int = 3, argsz: int = 32) -> bytes:
    return DMA_MAP.build({"argsz": argsz, "flags": flags, "offset": offset, "address": address, "size": size})


def dma_unmap(address: int, size: int, *, flags: int = 0) -> bytes:
    return DMA_UNMAP.build({"argsz": 24, "flags": flags, "address": address, "size": size})


def irq_set(index: int, start: int, count: int, flags: int = EVENTFDS) -> bytes:
    return IRQ_SET.build({"argsz": 20, "flags": flags, "index": index, "start": start, "count": count})


def access(region: int, offset: int, count: int) -> bytes:
    return REGION_ACCESS.build({"offset": offset, "region": region, "count": count})


async def capability(attack: Attack, cap_id: int, cfg_type: int | None = None) -> int:
    """Offset of a capability in config space; of a virtio one if its type is given."""
    space = (await attack.driver.read(PciRegion.CONFIG, 0, 256)).to_bytes(256, "little")
    at = space[0x34]
    while space[at] != cap_id or cfg_type not in (None, space[at + 3]):
        at = space[at + 1]
    return at


async def window_cap(attack: Attack) -> int:
    """Offset of the capability PCI_CFG in config space."""
    return await capability(attack, CapId.VNDR, CfgType.PCI)


async def look_through(attack: Attack, bar: int, offset: int, length: int, count: int = 4) -> int:
    """Set the window in config space (virtio 1.4, 4.1.4.9), and read ``count`` bytes of its data."""
    at = await window_cap(attack)
    for place, value, size in ((4, bar, 1), (8, offset, 4), (12, length, 4)):
        attack.driver.write(PciRegion.CONFIG, at + place, value.to_bytes(size, "little"))
    return await attack.driver.read(PciRegion.CONFIG, at + 16, count)


async def push_through(attack: Attack, bar: int, offset: int, length: int, data: bytes) -> None:
    """Set the window, and write ``data`` to its data."""
    at = await window_cap(attack)
    for place, value, size in ((4, bar, 1), (8, offset, 4), (12, length, 4)):
        attack.driver.write(PciRegion.CONFIG, at + place, value.to_bytes(size, "little"))
    attack.driver.write(PciRegion.CONFIG, at + 16, data)
