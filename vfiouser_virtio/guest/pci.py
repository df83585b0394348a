"""PCI enumeration, driver side (PCI Local Bus 3.0 §6): BARs, capabilities, and the command register.

`enumerate_function` reads the type-0 header, sizes the BARs (6.2.5.1) and walks the capabilities (6.7). Every number a
device gives is checked before it is used: a list that loops, or a pointer into the header, is `DeviceBroken` (PI1).
"""

from dataclasses import dataclass
from typing import Literal

from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.ports import PciPort
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import (
    CFG_SPACE_SIZE,
    EXP_CAP,
    MSI_CAP,
    MSI_FLAGS_64BIT,
    MSI_MAX_VECTORS,
    MSIX_CAP,
    PM_CAP,
    STD_HEADER_SIZEOF,
    STD_NUM_BARS,
    TYPE0_HEADER,
    BaseAddress,
    CapId,
    MsiFlags,
    MsixFlags,
    PciCommand,
    PciStatus,
)
from vfiouser_virtio.protocols.virtio.ids import PCI_DEVICE_ID_BASE

_HEADER = offsets(TYPE0_HEADER)
_MSI, _MSIX = offsets(MSI_CAP), offsets(MSIX_CAP)
_BAR0 = _HEADER["base_address"][0]
_HEADER_TYPE_MASK = 0x7F  # bit 7: multi-function device
# A capability takes at least four bytes, so that is how many there can be (Linux has the same bound).
_MAX_CAPABILITIES = (CFG_SPACE_SIZE - STD_HEADER_SIZEOF) // 4
_CAPABILITY_SIZES = {CapId.PM: PM_CAP.sizeof(), CapId.EXP: EXP_CAP.sizeof(), CapId.MSIX: MSIX_CAP.sizeof()}
# Of any other capability nothing is known but the header, and two bytes that have to be there.
_UNKNOWN_SIZE = 4
_BIR_MASK = 0x7  # of the table and pba registers: which BAR (PCI 3.0, 6.8.2.4)
_IO_FLAGS, _MEMORY_FLAGS = 0x3, 0xF  # the bits of a BAR that are no address

BarKind = Literal["io", "mem32", "mem64"]


@dataclass(frozen=True, slots=True)
class BarInfo:
    """Base address register that exists; ``size`` in bytes, ``address`` as it was found (0: not set yet)."""

    index: int
    kind: BarKind
    size: int
    prefetchable: bool
    address: int


@dataclass(frozen=True, slots=True)
class CapabilityInfo:
    """Entry of the capability list: all its bytes where its length is known, else the first four."""

    id: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MsixInfo:
    """MSI-X capability at ``offset`` of config space: how many vectors, and where their tables are."""

    offset: int
    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


@dataclass(frozen=True, slots=True)
class MsiInfo:
    """MSI capability at ``offset`` of config space: how many vectors, and whether each has a mask bit."""

    offset: int
    vectors: int
    maskable: bool


@dataclass(frozen=True, slots=True)
class PciFunctionInfo:
    """PCI function as it was found. Transport.ids, too: it has all that `guest.ports.Ids` asks for."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    revision: int
    header_type: int
    interrupt_pin: int
    """1 to 4: INTA to INTD; 0: it has no INTx."""
    command: int
    status: int
    bars: tuple[BarInfo, ...]
    capabilities: tuple[CapabilityInfo, ...]
    """In the order of the list."""
    msix: MsixInfo | None
    msi: MsiInfo | None = None

    @property
    def virtio_id(self) -> int:
        """Virtio device type, if this is a virtio function at all (virtio 1.4, 4.1.2)."""
        return self.device - PCI_DEVICE_ID_BASE

    def bar(self, index: int) -> BarInfo | None:
        """The BAR with this index; None where there is none."""
        return next((bar for bar in self.bars if bar.index == index), None)

    def find(self, cap_id: int) -> CapabilityInfo | None:
        """The first capability with this id."""
        return next((capability for capability in self.capabilities if capability.id == cap_id), None)

    def __str__(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x} class {self.class_code:06x} rev {self.revision:02x}"


async def enumerate_function(port: PciPort) -> PciFunctionInfo:
    """Find out everything about the function behind ``port``; it is left as it was found.

    Raises DeviceBroken (PI1) when there is no function, when it is no endpoint, or when its lists make no sense.
    """

    async def field(name: str) -> int:
        return await port.config_read(*_HEADER[name])

    vendor, device = await field("vendor_id"), await field("device_id")
    if vendor in (0x0000, 0xFFFF):
        raise DeviceBroken(f"{port.name}: nothing is there: vendor id {vendor:#06x}", "PI1")
    header_type = await field("header_type")
    if header_type & _HEADER_TYPE_MASK:
        raise DeviceBroken(f"{port.name}: header type {header_type:#04x} is no endpoint's (0)", "PI1")
    status = await field("status")
    bars = await _size_bars(port)
    capabilities = await _walk_capabilities(port) if status & PciStatus.CAP_LIST else ()
    return PciFunctionInfo(
        vendor=vendor,
        device=device,
        subsystem_vendor=await field("subsystem_vendor_id"),
        subsystem=await field("subsystem_id"),
        class_code=await field("class_device") << 8 | await field("class_prog"),
        revision=await field("revision_id"),
        header_type=header_type,
        interrupt_pin=await field("interrupt_pin"),
        command=await field("command"),
        status=status,
        bars=bars,
        capabilities=capabilities,
        msi=next((_msi(capability) for capability in capabilities if capability.id == CapId.MSI), None),
        msix=next((_msix(capability) for capability in capabilities if capability.id == CapId.MSIX), None),
    )


async def set_command(port: PciPort, *, set: int = 0, clear: int = 0) -> int:  # noqa: A002 - reads as it should
    """Change bits of the command register; returns what it holds then."""
    command = await port.config_read(*_HEADER["command"]) & ~clear | set
    await port.config_write(*_HEADER["command"], command)
    return command


async def set_msix(port: PciPort, msix: MsixInfo, *, enable: bool, mask_all: bool = False) -> None:
    """Write message control (6.8.2.3)."""
    at, size = _MSIX["flags"]
    flags = await port.config_read(msix.offset + at, size) & ~(MsixFlags.ENABLE | MsixFlags.MASKALL)
    flags |= MsixFlags.ENABLE * enable | MsixFlags.MASKALL * mask_all
    await port.config_write(msix.offset + at, size, int(flags))


async def set_msi(port: PciPort, msi: MsiInfo, vectors: int) -> None:
    """Write message control (6.8.1.3): grant ``vectors``, a power of two, and enable MSI; 0: disable it.

    Where a message goes to is for the port: a guest's CPU writes address and data before.
    """
    if vectors > msi.vectors or vectors.bit_count() > 1:
        raise ValueError(f"MSI with {vectors} of {msi.vectors} vectors")
    granted = (vectors.bit_length() - 1 << 4 | MsiFlags.ENABLE) if vectors else 0
    at, size = _MSI["flags"]
    flags = await port.config_read(msi.offset + at, size) & ~(MsiFlags.ENABLE | MsiFlags.QSIZE)
    await port.config_write(msi.offset + at, size, int(flags | granted))


async def _size_bars(port: PciPort) -> tuple[BarInfo, ...]:
    # While a BAR holds all ones, the function must not answer there.
    command = await port.config_read(*_HEADER["command"])
    await port.config_write(*_HEADER["command"], command & ~(PciCommand.IO | PciCommand.MEMORY))
    try:
        bars: list[BarInfo] = []
        index = 0
        while index < STD_NUM_BARS:
            bar = await _size_bar(port, index)
            if bar is not None:
                bars.append(bar)
            index += 2 if bar is not None and bar.kind == "mem64" else 1
        return tuple(bars)
    finally:
        await port.config_write(*_HEADER["command"], command)


async def _size_bar(port: PciPort, index: int) -> BarInfo | None:
    original, probed = await _probe_bar(port, index)
    if not probed:
        return None
    if probed & BaseAddress.SPACE_IO:
        # The upper half may be hard-wired to 0 (6.2.5.1).
        mask = probed & ~_IO_FLAGS | (0xFFFF_0000 if not probed >> 16 else 0)
        return BarInfo(index, "io", _size(port, index, mask, 32), prefetchable=False, address=original & ~_IO_FLAGS)
    mask, address, bits = probed & ~_MEMORY_FLAGS, original & ~_MEMORY_FLAGS, 32
    if probed & BaseAddress.MEM_TYPE_64:
        if index + 1 == STD_NUM_BARS:
            raise DeviceBroken(f"{port.name}: BAR{index} says that it has 64 bits, but it is the last", "PI1")
        upper, upper_mask = await _probe_bar(port, index + 1)
        mask, address, bits = mask | upper_mask << 32, address | upper << 32, 64
    return BarInfo(
        index,
        "mem64" if bits == 64 else "mem32",
        _size(port, index, mask, bits),
        prefetchable=bool(probed & BaseAddress.MEM_PREFETCH),
        address=address,
    )


async def _probe_bar(port: PciPort, index: int) -> tuple[int, int]:
    """What one register holds, and which of its bits can be set."""
    at = _BAR0 + 4 * index
    original = await port.config_read(at, 4)
    await port.config_write(at, 4, 0xFFFF_FFFF)
    probed = await port.config_read(at, 4)
    await port.config_write(at, 4, original)
    return original, probed


def _size(port: PciPort, index: int, mask: int, bits: int) -> int:
    size = (1 << bits) - mask
    if size == 1 << bits or size & (size - 1):
        raise DeviceBroken(f"{port.name}: BAR{index} decodes address bits {mask:#x}, which is no size", "PI1")
    return size


async def _walk_capabilities(port: PciPort) -> tuple[CapabilityInfo, ...]:
    found: list[CapabilityInfo] = []
    seen: set[int] = set()
    # The lower two bits are reserved: software masks them (6.7).
    at = await port.config_read(*_HEADER["capability_list"]) & ~3
    while at:
        if at < STD_HEADER_SIZEOF:
            raise DeviceBroken(f"{port.name}: a capability at {at:#04x}, inside the header", "PI1")
        if at in seen or len(found) >= _MAX_CAPABILITIES:
            raise DeviceBroken(f"{port.name}: the capability list comes back to {at:#04x}", "PI1")
        seen.add(at)
        capability = await _read_capability(port, at)
        found.append(capability)
        at = capability.data[1] & ~3
    return tuple(found)


async def _read_capability(port: PciPort, at: int) -> CapabilityInfo:
    first = (await port.config_read(at, 4)).to_bytes(4, "little")
    if first[0] == CapId.VNDR:
        size = first[2]
    elif first[0] == CapId.MSI:
        flags = int.from_bytes(first[2:4], "little")
        size = 10 + 4 * bool(flags & MSI_FLAGS_64BIT) + 10 * bool(flags & MsiFlags.MASKBIT)  # four forms (6.8.1)
    else:
        size = _CAPABILITY_SIZES.get(CapId(first[0]), 0) if _known(first[0]) else 0
    end = max(at + size, at + _UNKNOWN_SIZE)
    if end > CFG_SPACE_SIZE:
        raise DeviceBroken(f"{port.name}: capability {first[0]:#04x} at {at:#04x} ends beyond config space", "PI1")
    data = first
    for offset in range(at + 4, end, 4):
        data += (await port.config_read(offset, 4)).to_bytes(4, "little")
    return CapabilityInfo(first[0], at, data[: end - at])


def _known(cap_id: int) -> bool:
    return cap_id in {*CapId}


def _msi(capability: CapabilityInfo) -> MsiInfo:
    at, size = _MSI["flags"]
    flags = int.from_bytes(capability.data[at : at + size], "little")
    # Numbers above that of 32 vectors are reserved.
    vectors = 1 << min((flags & MsiFlags.QMASK) >> 1, MSI_MAX_VECTORS.bit_length() - 1)
    return MsiInfo(capability.offset, vectors, maskable=bool(flags & MsiFlags.MASKBIT))


def _msix(capability: CapabilityInfo) -> MsixInfo:
    def field(name: str) -> int:
        at, size = _MSIX[name]
        return int.from_bytes(capability.data[at : at + size], "little")

    table, pba = field("table"), field("pba")
    return MsixInfo(
        offset=capability.offset,
        vectors=(field("flags") & MsixFlags.QSIZE) + 1,
        table_bar=table & _BIR_MASK,
        table_offset=table & ~_BIR_MASK,
        pba_bar=pba & _BIR_MASK,
        pba_offset=pba & ~_BIR_MASK,
    )
