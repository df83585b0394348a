"""Virtio Structure PCI Capabilities, driver side (virtio 1.4, 4.1.4): where a device has put its registers.

A device may put them into any BAR, in any order, and offer several of a kind, the one it likes best first. The first
of each kind that can be used is (4.1.4.1): one whose kind or BAR is unknown is passed over, and so is one that does not
fit into its BAR.
"""

from dataclasses import dataclass, field, replace

from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.pci import CapabilityInfo, PciFunctionInfo
from vfiouser_virtio.guest.ports import PciPort
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_NUM_BARS, CapId
from vfiouser_virtio.protocols.virtio.pci import CAP, CAP64, CFG_CAP, COMMON_CFG_OFFSETS, NOTIFY_CAP, CfgType

_CAP = offsets(CAP)
_CAP64 = offsets(CAP64)
_NOTIFY_MULTIPLIER = offsets(NOTIFY_CAP)["notify_off_multiplier"]
_WINDOW_DATA = offsets(CFG_CAP)["pci_cfg_data"][0]
# Up to queue_device, as in virtio 1.0: what comes behind belongs to features that may not be there.
_MIN_COMMON = COMMON_CFG_OFFSETS["queue_notif_config_data"][0]
_KINDS = frozenset(CfgType)
# (cap_len at least, length at least, alignment of offset, the rule that says so)
_LIMITS = {
    CfgType.COMMON: (CAP.sizeof(), _MIN_COMMON, 4, "CC1"),
    CfgType.NOTIFY: (NOTIFY_CAP.sizeof(), 2, 2, "NT1"),
    CfgType.ISR: (CAP.sizeof(), 1, 1, "IS1"),
    CfgType.DEVICE: (CAP.sizeof(), 1, 4, "DC1"),
    CfgType.SHARED_MEMORY: (CAP64.sizeof(), 1, 1, "SM1"),
}


@dataclass(frozen=True, slots=True)
class VirtioStructure:
    """Virtio capability, at ``cap_offset`` of config space: ``length`` bytes at ``offset`` of a BAR."""

    cfg_type: int
    bar: int
    id: int
    offset: int
    length: int
    cap_offset: int
    cap_len: int
    multiplier: int = 0
    """Of a NOTIFY structure: bytes between the notification addresses of two values of queue_notify_off."""
    problem: str = ""
    """Why a driver must pass it over, beginning with the rule; empty for a usable one."""

    def __str__(self) -> str:
        kind = CfgType(self.cfg_type).name if self.cfg_type in _KINDS else f"type {self.cfg_type:#x}"
        return f"{kind} at BAR{self.bar} {self.offset:#x}+{self.length:#x}"


@dataclass(frozen=True, slots=True)
class VirtioLayout:
    """Structures that a driver uses."""

    common: VirtioStructure
    notify: VirtioStructure
    isr: VirtioStructure
    device: VirtioStructure | None = None
    pci_cfg: VirtioStructure | None = None
    shared_memory: dict[int, VirtioStructure] = field(default_factory=dict)
    """By their id (``shmid``)."""


def virtio_structures(info: PciFunctionInfo) -> list[VirtioStructure]:
    """Every virtio structure capability of a function, usable or not, in the order of the list."""
    return [
        _parse(info, capability)
        for capability in info.capabilities
        if capability.id == CapId.VNDR and len(capability.data) >= CAP.sizeof()
    ]


def locate(info: PciFunctionInfo) -> VirtioLayout:
    """The structures to use. Raises DeviceBroken (CC1, NT1, IS1) when one that must be there cannot be used."""
    structures = virtio_structures(info)
    usable = [structure for structure in structures if not structure.problem]

    def first(kind: CfgType) -> VirtioStructure | None:
        return next((structure for structure in usable if structure.cfg_type == kind), None)

    def need(kind: CfgType) -> VirtioStructure:
        structure = first(kind)
        if structure is None:
            why = (
                "; ".join(f"{each}: {each.problem}" for each in structures if each.cfg_type == kind) or "none is there"
            )
            raise DeviceBroken(f"{info}: no usable {kind.name} structure: {why}", _LIMITS[kind][3])
        return structure

    shared: dict[int, VirtioStructure] = {}
    for structure in usable:
        if structure.cfg_type == CfgType.SHARED_MEMORY:
            shared.setdefault(structure.id, structure)
    return VirtioLayout(
        common=need(CfgType.COMMON),
        notify=need(CfgType.NOTIFY),
        isr=need(CfgType.ISR),
        device=first(CfgType.DEVICE),
        pci_cfg=first(CfgType.PCI),
        shared_memory=shared,
    )


async def window_read(port: PciPort, pci_cfg: VirtioStructure, bar: int, offset: int, size: int) -> int:
    """Read 1, 2 or 4 bytes of a BAR through the PCI configuration access capability (4.1.4.9)."""
    await _aim_window(port, pci_cfg, bar, offset, size)
    return await port.config_read(pci_cfg.cap_offset + _WINDOW_DATA, size)


async def window_write(port: PciPort, pci_cfg: VirtioStructure, bar: int, offset: int, size: int, value: int) -> None:
    """Write 1, 2 or 4 bytes of a BAR through the PCI configuration access capability (4.1.4.9)."""
    await _aim_window(port, pci_cfg, bar, offset, size)
    await port.config_write(pci_cfg.cap_offset + _WINDOW_DATA, size, value)


async def _aim_window(port: PciPort, pci_cfg: VirtioStructure, bar: int, offset: int, size: int) -> None:
    for name, value in (("bar", bar), ("offset", offset), ("length", size)):
        at, width = _CAP[name]
        await port.config_write(pci_cfg.cap_offset + at, width, value)


def _parse(info: PciFunctionInfo, capability: CapabilityInfo) -> VirtioStructure:
    data = capability.data

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    kind, offset, length = number(*_CAP["cfg_type"]), number(*_CAP["offset"]), number(*_CAP["length"])
    if kind == CfgType.SHARED_MEMORY:
        offset, length = offset | number(*_CAP64["offset_hi"]) << 32, length | number(*_CAP64["length_hi"]) << 32
    structure = VirtioStructure(
        cfg_type=kind,
        bar=number(*_CAP["bar"]),
        id=number(*_CAP["id"]),
        offset=offset,
        length=length,
        cap_offset=capability.offset,
        cap_len=len(data),
        multiplier=number(*_NOTIFY_MULTIPLIER) if kind == CfgType.NOTIFY else 0,
    )
    return replace(structure, problem=_problem(info, structure))


def _problem(info: PciFunctionInfo, structure: VirtioStructure) -> str:
    kind = structure.cfg_type
    if kind == CfgType.PCI:  # its bar, offset and length are the driver's to write
        short = structure.cap_len < CFG_CAP.sizeof()
        return f"PA1: cap_len {structure.cap_len:#x} has no room for pci_cfg_data" if short else ""
    limits = _LIMITS.get(CfgType(kind)) if kind in _KINDS else None
    if limits is None:
        return "" if kind == CfgType.VENDOR else f"PC1: cfg_type {kind:#x} is reserved"
    min_cap_len, min_length, align, rule = limits
    if structure.cap_len < min_cap_len:
        return f"PC1: cap_len {structure.cap_len:#x} is less than {min_cap_len:#x}"
    if structure.bar >= STD_NUM_BARS:
        return f"PC1: bar {structure.bar:#x} is reserved"
    if structure.length < min_length:
        return f"{rule}: length {structure.length:#x} is less than {min_length:#x}"
    if structure.offset % align:
        return f"{rule}: offset {structure.offset:#x} is not aligned to {align}"
    bar = info.bar(structure.bar)
    size = 0 if bar is None else bar.size
    if structure.offset + structure.length > size:
        return f"{rule}: it ends beyond BAR{structure.bar}, which has {size:#x} bytes"
    return ""
