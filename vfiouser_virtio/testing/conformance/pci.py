"""Virtio over PCI (virtio 1.4, 4.1): identity, and the capabilities that say where the structures are."""

from itertools import pairwise

from vfiouser_virtio.guest.pci import CapabilityInfo
from vfiouser_virtio.guest.pci_structures import VirtioStructure, virtio_structures, window_read, window_write
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import MSIX_ENTRY_SIZE, STD_HEADER_SIZEOF, STD_NUM_BARS, CapId, PciCommand
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import CAP, CAP64, CFG_CAP, COMMON_CFG_OFFSETS, NOTIFY_CAP, VENDOR_ID, CfgType
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import MSIX, SHOULD, check
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note

_CAP = offsets(CAP)
_NON_TRANSITIONAL = range(0x1040, 0x1080)
_TRANSITIONAL = {0x1000, 0x1001, 0x1002, 0x1003, 0x1004, 0x1005, 0x1009}
_COMMAND = 4
# vendor_id of a VENDOR capability stands behind cap_vndr, cap_next, cap_len and cfg_type (4.1.4.8).
_VENDOR_ID_AT = 4


def _structures(bench: Bench, *kinds: CfgType) -> list[VirtioStructure]:
    return [structure for structure in virtio_structures(bench.info) if structure.cfg_type in kinds]


def _vendor_capabilities(bench: Bench, kind: CfgType) -> list[CapabilityInfo]:
    at = _CAP["cfg_type"][0]
    return [
        capability
        for capability in bench.info.capabilities
        if capability.id == CapId.VNDR and len(capability.data) > at and capability.data[at] == kind
    ]


@check(
    "virtio14/PI1",
    section="Virtio Over PCI Bus",
    observe="walk header and capabilities, size all BARs, compare with the regions, toggle a bit of COMMAND",
)
async def pi1(bench: Bench) -> None:
    """The function obeys PCI: a type-0 header, a sound capability list, BARs of powers of two, COMMAND that holds."""
    client, info = bench.client, bench.info
    spans = sorted((each.offset, each.offset + len(each.data)) for each in info.capabilities)
    for (_, end), (start, _) in pairwise(spans):
        note(end <= start, f"the capability at {start:#x} begins inside the one that ends at {end:#x}")
    for start, _ in spans:
        note(start >= STD_HEADER_SIZEOF and not start % 4, f"a capability at {start:#x}")
    for index in range(STD_NUM_BARS):
        bar, region = info.bar(index), await client.region_info(index)
        size = 0 if bar is None else bar.size
        note(region.size == size, f"BAR{index} decodes {size:#x} bytes, but region {index} has {region.size:#x} (QEMU)")
    command = await client.config_read(_COMMAND, 2)
    for value in (command & ~PciCommand.MASTER, command | PciCommand.MASTER):
        await client.config_write(_COMMAND, 2, int(value))
        seen = await client.config_read(_COMMAND, 2)
        note(seen == value, f"command register: {int(value):#x} was written, {seen:#x} is read")


@check(
    "virtio14/PI1-msix",
    section="Virtio Over PCI Bus",
    observe="the BARs that Table BIR and PBA BIR of the MSI-X capability name",
    needs=(MSIX,),
)
async def pi1_msix(bench: Bench) -> None:
    """The function obeys PCI: MSI-X table and pending bits are in memory space (PCI 3.0, 6.8.2), inside their BARs."""
    msix = bench.info.msix
    assert msix is not None
    table_size, pba_size = msix.vectors * MSIX_ENTRY_SIZE, (msix.vectors + 63) // 64 * 8
    for what, number, offset, size in (
        ("table", msix.table_bar, msix.table_offset, table_size),
        ("pending bits", msix.pba_bar, msix.pba_offset, pba_size),
    ):
        bar = bench.info.bar(number)
        if bar is None:
            note(False, f"the MSI-X {what} are in BAR{number}, which is not there")
            continue
        note(bar.kind != "io", f"the MSI-X {what} are in BAR{number}, which decodes I/O ports")
        note(offset + size <= bar.size, f"the MSI-X {what} end at {offset + size:#x}, BAR{number} at {bar.size:#x}")


@check("virtio14/PI2", section="PCI Device Discovery", observe="vendor and device id in config space")
async def pi2(bench: Bench) -> None:
    """The vendor id is 1AF4; the device id is 1040 plus the virtio type, or a transitional one."""
    info = bench.info
    note(info.vendor == VENDOR_ID, f"vendor id is {info.vendor:#06x}, not 0x1af4")
    known = info.device in _NON_TRANSITIONAL or info.device in _TRANSITIONAL
    note(known, f"device id is {info.device:#06x}, which is no virtio device's")


@check(
    "virtio14/PI3",
    section="PCI Device Discovery",
    keyword=SHOULD,
    observe="revision and subsystem id in config space",
)
async def pi3(bench: Bench) -> None:
    """A non-transitional device has revision 1 or higher and a subsystem id of 0x40 or higher."""
    info = bench.info
    if info.device in _TRANSITIONAL:
        raise NotApplicable(f"device id {info.device:#06x} is a transitional one")
    note(info.revision >= 1, f"revision is {info.revision:#x}, that of a transitional device")
    note(info.subsystem >= 0x40, f"subsystem id is {info.subsystem:#x}, below 0x40")


@check(
    "virtio14/PI4",
    section="PCI Device Layout",
    observe="write each half of queue_desc, queue_driver and queue_device apart, read halves and bytes back",
)
async def pi4(bench: Bench) -> None:
    """Both halves of a 64-bit configuration field can be accessed independently."""
    await bench.negotiate()
    await bench.select(0)
    for name in ("queue_desc", "queue_driver", "queue_device"):
        at = COMMON_CFG_OFFSETS[name][0]
        for half, value in ((4, 0x1122_3344), (0, 0x5566_7780)):
            await bench.write(at + half, 4, value)
            seen = await bench.read(at + half, 4)
            note(seen == value, f"{name} bytes {half} to {half + 3}: {value:#x} was written, {seen:#x} is read")
        seen = await bench.read(at + 4, 4)
        note(seen == 0x1122_3344, f"{name}: writing the lower half has changed the upper one to {seen:#x}")


@check(
    "virtio14/PC1",
    section="Virtio Structure PCI Capabilities",
    observe="cap_len of each capability against what its type has at its end",
)
async def pc1(bench: Bench) -> None:
    """cap_len covers the whole capability, what follows struct virtio_pci_cap included."""
    least = {
        CfgType.NOTIFY: NOTIFY_CAP.sizeof(),
        CfgType.PCI: CFG_CAP.sizeof(),
        CfgType.SHARED_MEMORY: CAP64.sizeof(),
    }
    for kind in (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE, CfgType.PCI, CfgType.SHARED_MEMORY):
        size = least.get(kind, CAP.sizeof())
        for capability in _vendor_capabilities(bench, kind):
            length = len(capability.data)
            note(length >= size, f"{kind.name} at {capability.offset:#x}: cap_len {length:#x} is below {size:#x}")


@check("virtio14/CC1", section="Common configuration structure layout", observe="the capabilities of type COMMON_CFG")
async def cc1(bench: Bench) -> None:
    """There is a common configuration structure, at an offset that is a multiple of 4."""
    for structure in _structures(bench, CfgType.COMMON):
        note(not structure.offset % 4, f"{structure}: the offset is no multiple of 4")


@check("virtio14/NT1", section="Notification capability", observe="offset of each NOTIFY_CFG capability")
async def nt1(bench: Bench) -> None:
    """There is a notification structure; its offset is 2-aligned, with NOTIFICATION_DATA 4-aligned."""
    align = 4 if bench.offered & Feature.NOTIFICATION_DATA.mask else 2
    for structure in _structures(bench, CfgType.NOTIFY):
        note(not structure.offset % align, f"{structure}: the offset is no multiple of {align}")


@check("virtio14/NT2", section="Notification capability", observe="notify_off_multiplier")
async def nt2(bench: Bench) -> None:
    """notify_off_multiplier is 0 or an even power of two; with NOTIFICATION_DATA a multiple of 4."""
    least = 4 if bench.offered & Feature.NOTIFICATION_DATA.mask else 2
    for structure in _structures(bench, CfgType.NOTIFY):
        value = structure.multiplier
        fits = value == 0 or (value >= least and not value & (value - 1))
        note(fits, f"notify_off_multiplier is {value:#x}: not 0, nor a power of two from {least} on")


@check("virtio14/NT3", section="Notification capability", observe="queue_notify_off of every queue, and cap.length")
async def nt3(bench: Bench) -> None:
    """The notification structure is long enough for every queue."""
    notify = bench.layout.notify
    width = 4 if bench.offered & Feature.NOTIFICATION_DATA.mask else 2
    note(notify.length >= width, f"cap.length is {notify.length:#x}, less than one notification of {width}")
    for queue in range(await bench.get("num_queues")):
        await bench.select(queue)
        end = await bench.get("queue_notify_off") * notify.multiplier + width
        note(end <= notify.length, f"queue {queue} is notified up to {end:#x}, cap.length is {notify.length:#x}")


@check("virtio14/SM1", section="Shared memory capability", observe="the capabilities of type SHARED_MEMORY_CFG")
async def sm1(bench: Bench) -> None:
    """A shared memory region lies inside its BAR, and its id is unique."""
    regions = _structures(bench, CfgType.SHARED_MEMORY)
    if not regions:
        raise NotApplicable("needs shared memory")
    ids = [region.id for region in regions]
    note(len(set(ids)) == len(ids), f"shared memory ids {ids} are not unique")
    for region in regions:
        bar = bench.info.bar(region.bar)
        size = 0 if bar is None else bar.size
        note(region.offset + region.length <= size, f"{region} is not inside the BAR of {size:#x} bytes")


@check("virtio14/VD1", section="Vendor data capability", observe="the capabilities of type VENDOR_CFG")
async def vd1(bench: Bench) -> None:
    """A vendor data capability names a vendor other than 1AF4, and its size is a multiple of 4."""
    capabilities = _vendor_capabilities(bench, CfgType.VENDOR)
    if not capabilities:
        raise NotApplicable("needs a vendor data capability")
    for capability in capabilities:
        vendor = int.from_bytes(capability.data[_VENDOR_ID_AT : _VENDOR_ID_AT + 2], "little")
        note(vendor != VENDOR_ID, f"vendor data at {capability.offset:#x} has vendor_id 0x1af4")
        length = len(capability.data)
        note(not length % 4, f"vendor data at {capability.offset:#x} has {length:#x} bytes, no multiple of 4")


@check(
    "virtio14/PA1",
    section="PCI configuration access capability",
    observe="read num_queues, and write and read driver_feature_select, through pci_cfg_data and through the BAR",
)
async def pa1(bench: Bench) -> None:
    """The PCI_CFG capability exists; an access of pci_cfg_data is one of cap.length bytes at cap.bar, cap.offset."""
    client, window, common = bench.client, bench.layout.pci_cfg, bench.layout.common
    expect(window is not None, "there is no usable PCI_CFG capability")
    assert window is not None
    for name in ("num_queues", "device_status"):
        at, size = COMMON_CFG_OFFSETS[name]
        direct = await bench.get(name)
        seen = await window_read(client, window, common.bar, common.offset + at, size)
        note(seen == direct, f"{name} reads {seen:#x} through the window, {direct:#x} through the BAR")
    at, size = COMMON_CFG_OFFSETS["driver_feature_select"]
    await window_write(client, window, common.bar, common.offset + at, size, 1)
    seen = await bench.get("driver_feature_select")
    note(seen == 1, f"driver_feature_select is {seen:#x} after 1 was written through the window")
