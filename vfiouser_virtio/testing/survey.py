"""Survey of a vfio-user server: its regions and interrupts, the PCI function, and the virtio device in it.

`survey` looks at everything and changes as little as it can: it sizes the BARs, turns memory decoding on and moves the
selectors of the common configuration. It ends with a reset, so that the next client finds the device as after power-on.
"""

from dataclasses import asdict, dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.pci import CapabilityInfo, PciFunctionInfo, enumerate_function, set_command
from vfiouser_virtio.guest.pci_structures import VirtioLayout, VirtioStructure, locate, virtio_structures
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import EXP_CAP, PM_CAP, CapId, ExpDevCap, PciCommand, PmCtrl
from vfiouser_virtio.protocols.vfio_user import DeviceFlags, IrqInfoFlags, PciIrq, PciRegion, RegionFlags, RegionInfoCap
from vfiouser_virtio.protocols.virtio.device_type import DeviceType
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS, Feature, is_device_type_bit
from vfiouser_virtio.protocols.virtio.ids import PCI_DEVICE_ID_BASE
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, VENDOR_ID, VENDOR_ID_2007, CfgType
from vfiouser_virtio.testing.readable_config import readable_config
from vfiouser_virtio.vfio_user import Client, RemoteError, Version

_VENDORS = {VENDOR_ID: "Red Hat (virtio)", VENDOR_ID_2007: "virtio, draft of 2007"}
_CLASSES = {
    0x00: "unclassified",
    0x01: "mass storage",
    0x02: "network",
    0x03: "display",
    0x04: "multimedia",
    0x05: "memory",
    0x07: "communication",
    0x09: "input",
    0x10: "encryption",
}
_MAX_REGIONS, _MAX_IRQS = 16, 16  # more than vfio has for PCI: a server may say any number
_MAX_QUEUES = 1024  # that are listed
_PIECE = 256  # bytes of configuration in one access
_EXP, _PM = offsets(EXP_CAP), offsets(PM_CAP)


@dataclass(frozen=True, slots=True)
class SurveyedRegion:
    """Region of a vfio device; ``capabilities`` are names of VFIO_REGION_INFO_CAP_*."""

    index: int
    name: str
    size: int
    flags: list[str]
    capabilities: list[str]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SurveyedIrq:
    """Interrupt index of a vfio device."""

    index: int
    name: str
    count: int
    flags: list[str]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SurveyedCapability:
    """PCI capability; ``detail`` is what it says in words."""

    offset: int
    id: int
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class SurveyedFeature:
    """Feature bit that the device offers; ``name`` is empty where nothing defines it."""

    bit: int
    name: str


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """Virtqueue, by the specification's name for it."""

    index: int
    name: str
    max_size: int
    notify_off: int


@dataclass(slots=True)
class VirtioInfo:
    """Virtio device of a function."""

    type: int
    name: str
    structures: list[VirtioStructure]
    status: int = 0
    """device_status as it was found."""
    generation: int = 0
    features: list[SurveyedFeature] = field(default_factory=list)
    config: dict[str, int | str] = field(default_factory=dict)
    """Fields by name, bytes as hexadecimal; ``raw`` where the type's fields are not known."""
    unread: list[str] = field(default_factory=list)
    """Fields of the configuration that the server refuses to read, or that are behind the end of its structure."""
    queues: list[QueueInfo] = field(default_factory=list)
    num_queues: int = 0
    problem: str = ""


@dataclass(slots=True)
class Survey:
    """Survey of a server; what could not be found out has its reason in ``problem``."""

    server: str
    version: Version | None
    flags: list[str]
    regions: list[SurveyedRegion]
    irqs: list[SurveyedIrq]
    config_space: bytes
    function: PciFunctionInfo | None = None
    names: dict[str, str] = field(default_factory=dict)
    """Of vendor, subsystem_vendor, device and class_code, where known."""
    capabilities: list[SurveyedCapability] = field(default_factory=list)
    virtio: VirtioInfo | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value.hex() if isinstance(value, bytes) else value for name, value in items}

        found = asdict(self, dict_factory=plain)
        if found["function"] is not None:
            del found["function"]["capabilities"]  # they are decoded beside it
        return found


async def survey(client: Client) -> Survey:
    """Look at what is behind ``client``, which has negotiated its version. Raises PeerError when the server goes."""
    info = await client.device_info()
    found = Survey(
        server=client.name,
        version=client.version,
        flags=_names(DeviceFlags, info.flags),
        regions=[await _region(client, index) for index in range(min(info.num_regions, _MAX_REGIONS))],
        irqs=[await _irq(client, index) for index in range(min(info.num_irqs, _MAX_IRQS))],
        config_space=b"",
    )
    size = next((region.size for region in found.regions if region.index == PciRegion.CONFIG), 0)
    found.config_space = b"".join(
        [await client.region_read(PciRegion.CONFIG, at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
    )
    try:
        found.function = function = await enumerate_function(client)
        found.names = _ids(function)
        found.capabilities = [_capability(function, each) for each in function.capabilities]
        structures = virtio_structures(function)
        if structures:
            known = device_type(function.virtio_id)
            found.virtio = VirtioInfo(function.virtio_id, known.name, structures)
            await _look_inside(client, function, found.virtio, known)
    except (DeviceBroken, RemoteError) as error:
        found.problem = str(error)
    if info.flags & DeviceFlags.RESET:
        await client.device_reset()
    return found


async def _region(client: Client, index: int) -> SurveyedRegion:
    name = _name(PciRegion, index, "region")
    try:
        info = await client.region_info(index)
    except RemoteError as error:
        return SurveyedRegion(index, name, 0, [], [], problem=error.strerror or str(error))
    capabilities = [
        _name(RegionInfoCap, number, "capability", hex(number)) for number, _version, _body in info.capabilities
    ]
    return SurveyedRegion(index, name, info.size, _names(RegionFlags, info.flags), capabilities)


async def _irq(client: Client, index: int) -> SurveyedIrq:
    name = _name(PciIrq, index, "irq")
    try:
        info = await client.irq_info(index)
    except RemoteError as error:
        return SurveyedIrq(index, name, 0, [], problem=error.strerror or str(error))
    return SurveyedIrq(index, name, info.count, _names(IrqInfoFlags, info.flags))


async def _look_inside(client: Client, function: PciFunctionInfo, virtio: VirtioInfo, known: DeviceType) -> None:
    try:
        layout = locate(function)
    except DeviceBroken as error:
        virtio.problem = str(error)
        return
    await set_command(client, set=PciCommand.MEMORY)
    common = layout.common

    async def get(name: str) -> int:
        at, size = COMMON_CFG_OFFSETS[name]
        return await client.bar_read(common.bar, common.offset + at, size)

    async def select(name: str, value: int) -> None:
        at, size = COMMON_CFG_OFFSETS[name]
        await client.bar_write(common.bar, common.offset + at, size, value)

    virtio.status, virtio.generation = await get("device_status"), await get("config_generation")
    offered = 0
    for word in range(FEATURE_BITS // 32):
        await select("device_feature_select", word)
        offered |= await get("device_feature") << 32 * word
    virtio.features = [_feature(bit, known) for bit in range(FEATURE_BITS) if offered >> bit & 1]
    virtio.num_queues = await get("num_queues")
    for index in range(min(virtio.num_queues, _MAX_QUEUES)):
        await select("queue_select", index)
        name = known.queue_name(index)
        virtio.queues.append(QueueInfo(index, name, await get("queue_size"), await get("queue_notify_off")))
    virtio.config, virtio.unread = await _config(client, layout, known)


async def _config(client: Client, layout: VirtioLayout, known: DeviceType) -> tuple[dict[str, int | str], list[str]]:
    """What can be read of it, and the names of what cannot: SPDK's has 60 bytes of a disk, whatever its length is."""
    device = layout.device
    if device is None:
        return {}, []
    if known.config is None:
        size = min(_PIECE, device.length)
        data = await readable_config(client, device, size)
        if not data and size:
            return {}, [f"raw ({size} bytes)"]
        return {"raw": data.rstrip(b"\0").hex(" ")} if any(data) else {}, []
    if known.config_pages:
        return await _config_pages(client, device, known)
    fields: dict[str, int | str] = {}
    unread: list[str] = []
    for name, (at, size) in offsets(known.config).items():
        if name.startswith(("unused", "padding")) or "_unused" in name:
            continue
        if at + size > device.length:
            unread.append(name)
            continue
        try:
            raw = await client.region_read(device.bar, device.offset + at, size)
        except RemoteError:
            unread.append(name)
            continue
        fields[name] = int.from_bytes(raw, "little") if size in (1, 2, 4, 8) else raw.hex(" ")
    return fields, unread


async def _config_pages(
    client: Client, device: VirtioStructure, known: DeviceType
) -> tuple[dict[str, int | str], list[str]]:
    """Likewise, of a type whose configuration shows what was selected in it."""
    assert known.config is not None
    places = offsets(known.config)
    shown: dict[str, int | str] = {}
    unread: list[str] = []
    for page in known.config_pages:
        try:
            for name, value in page.select.items():
                at, size = places[name]
                await client.bar_write(device.bar, device.offset + at, size, value)
            data = await client.region_read(device.bar, device.offset, known.config.sizeof())
        except RemoteError:
            unread.append(page.name)
            continue
        if text := page.text({name: data[at : at + size] for name, (at, size) in places.items()}):
            shown[page.name] = text
    return shown, unread


def _feature(bit: int, known: DeviceType) -> SurveyedFeature:
    source: type[IntEnum] | None = known.features if is_device_type_bit(bit) else Feature
    return SurveyedFeature(bit, source(bit).name if source is not None and bit in {*source} else "")


def _ids(function: PciFunctionInfo) -> dict[str, str]:
    names = {
        "vendor": _VENDORS.get(function.vendor, ""),
        "subsystem_vendor": _VENDORS.get(function.subsystem_vendor, ""),
    }
    if function.vendor in _VENDORS and function.device > PCI_DEVICE_ID_BASE:
        names["device"] = f"virtio {device_type(function.virtio_id).name}"
    names["class_code"] = _CLASSES.get(function.class_code >> 16, "")
    return {name: text for name, text in names.items() if text}


def _capability(function: PciFunctionInfo, capability: CapabilityInfo) -> SurveyedCapability:
    """A capability in words: the ones that a virtio function has."""

    def value(at: tuple[int, int]) -> int:
        return int.from_bytes(capability.data[at[0] : at[0] + at[1]], "little")

    number, name, detail = capability.id, _name(CapId, capability.id, "capability"), ""
    if number == CapId.MSIX and (msix := function.msix) is not None and msix.offset == capability.offset:
        table, pba = f"BAR{msix.table_bar} {msix.table_offset:#x}", f"BAR{msix.pba_bar} {msix.pba_offset:#x}"
        detail = f"{msix.vectors} vectors, table at {table}, pending bits at {pba}"
    elif number == CapId.MSI and (msi := function.msi) is not None and msi.offset == capability.offset:
        detail = f"{msi.vectors} vectors, {'with' if msi.maskable else 'without'} mask bits"
    elif number == CapId.PM:
        keeps = "keeps its state" if value(_PM["ctrl"]) & PmCtrl.NO_SOFT_RESET else "is reset"
        detail = f"version {value(_PM['pmc']) & 7}, {keeps} from D3hot to D0"
    elif number == CapId.EXP:
        with_flr = "with" if value(_EXP["devcap"]) & ExpDevCap.FLR else "without"
        detail = f"version {value(_EXP['flags']) & 0xF}, type {value(_EXP['flags']) >> 4 & 0xF}, {with_flr} FLR"
    elif number == CapId.VNDR:
        structure = next((each for each in virtio_structures(function) if each.cap_offset == capability.offset), None)
        detail = f"virtio {describe_structure(structure)}" if structure else f"{len(capability.data)} bytes"
    return SurveyedCapability(capability.offset, number, name, detail)


def describe_structure(structure: VirtioStructure) -> str:
    """``NOTIFY at BAR4 0x3000+0x1000, multiplier 4``, and what is wrong with it."""
    text = str(structure)
    if structure.cfg_type == CfgType.PCI:
        text = "PCI configuration access"
    if structure.cfg_type == CfgType.NOTIFY:
        text += f", multiplier {structure.multiplier}"
    if structure.cfg_type == CfgType.SHARED_MEMORY:
        text += f", id {structure.id}"
    return f"{text} (unusable: {structure.problem})" if structure.problem else text


def _name(names: type[IntEnum], value: int, otherwise: str, shown: str = "") -> str:
    return names(value).name if value in {*names} else f"{otherwise} {shown or value}"


def _names(flags: type[IntFlag], value: int) -> list[str]:
    return [flag.name or hex(flag) for flag in flags if value & flag]
