"""protocols/vfio_user.py against linux/vfio.h and linux/kvm.h, which we did not write."""

import enum

import pytest
from support.uapi import defines, struct_layout, struct_size

from vfiouser_virtio.protocols import vfio_user as vu
from vfiouser_virtio.protocols.codec import Schema, offsets

VFIO = defines("linux/vfio.h")
KVM = defines("linux/kvm.h")


# Our name of a field where it is not Linux's: the specification says address, the kernel iova (and vaddr).
STRUCTS: dict[str, tuple[Schema, dict[str, str]]] = {
    "vfio_device_info": (vu.DEVICE_INFO, {}),
    "vfio_region_info": (vu.REGION_INFO, {}),
    "vfio_irq_info": (vu.IRQ_INFO, {}),
    "vfio_irq_set": (vu.IRQ_SET, {}),
    "vfio_info_cap_header": (vu.INFO_CAP_HEADER, {}),
    "vfio_region_sparse_mmap_area": (vu.SPARSE_MMAP_AREA, {}),
    "vfio_iommu_type1_dma_map": (vu.DMA_MAP, {"offset": "vaddr", "address": "iova"}),
    "vfio_iommu_type1_dma_unmap": (vu.DMA_UNMAP, {"address": "iova"}),
    "vfio_device_feature": (vu.DEVICE_FEATURE_HEADER, {}),
    "vfio_device_feature_migration": (vu.FEATURE_MIGRATION, {}),
    "vfio_device_feature_mig_state": (vu.FEATURE_MIG_DEVICE_STATE, {}),
    "vfio_device_feature_dma_logging_range": (vu.FEATURE_DMA_LOGGING_RANGE, {}),
    "vfio_iommu_type1_dirty_bitmap": (vu.DIRTY_PAGES_HEADER, {}),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name: str) -> None:
    schema, renamed = STRUCTS[name]
    layout = struct_layout("linux/vfio.h", name)
    for field, place in offsets(schema).items():
        assert layout[renamed.get(field, field)] == place, field


@pytest.mark.parametrize(
    "name",
    [
        "vfio_region_info",
        "vfio_irq_info",
        "vfio_irq_set",
        "vfio_info_cap_header",
        "vfio_region_sparse_mmap_area",
        "vfio_iommu_type1_dma_map",
        "vfio_iommu_type1_dma_unmap",
        "vfio_device_feature",
    ],
)
def test_struct_size(name: str) -> None:
    assert STRUCTS[name][0].sizeof() == struct_size("linux/vfio.h", name)


def test_structs_with_an_array() -> None:
    sparse = struct_layout("linux/vfio.h", "vfio_region_info_cap_sparse_mmap")
    built = vu.SPARSE_MMAP.build({"areas": [{"offset": 0x11, "size": 0x22}]})
    header = vu.INFO_CAP_HEADER.sizeof()
    assert (sparse["nr_areas"], sparse["areas"][0]) == ((header, 4), header + built.index(0x11))
    logging = struct_layout("linux/vfio.h", "vfio_device_feature_dma_logging_control")
    built = vu.FEATURE_DMA_LOGGING_CONTROL.build({"page_size": 0x33, "ranges": [{"iova": 1, "length": 2}] * 3})
    assert (built[logging["page_size"][0]], built[logging["num_ranges"][0]]) == (0x33, 3)
    assert len(built) == logging["ranges"][0] + 3 * 16  # Linux has a pointer where we have the ranges
    report = struct_layout("linux/vfio.h", "vfio_device_feature_dma_logging_report")
    parsed = vu.FEATURE_DMA_LOGGING_REPORT.parse(bytes(range(report["page_size"][0] + 8)))
    assert parsed.page_size == int.from_bytes(range(16, 24), "little")
    assert parsed.bitmap == b""
    bitmap = struct_layout("linux/vfio.h", "vfio_iommu_type1_dirty_bitmap_get")
    parsed = vu.DIRTY_BITMAP_RANGE.parse(bytes(range(32)) + b"bits")
    assert bitmap["bitmap_pgsize"] == (16, 8)
    assert bitmap["bitmap_size"] == (24, 8)
    assert parsed.bitmap == b"bits"


FLAGS: dict[type[enum.IntEnum] | type[enum.IntFlag], str] = {
    vu.DeviceFlags: "VFIO_DEVICE_FLAGS_{}",
    vu.RegionFlags: "VFIO_REGION_INFO_FLAG_{}",
    vu.IrqInfoFlags: "VFIO_IRQ_INFO_{}",
    vu.IrqSetFlags: "VFIO_IRQ_SET_{}",
    vu.PciRegion: "VFIO_PCI_{}_REGION_INDEX",
    vu.PciIrq: "VFIO_PCI_{}_IRQ_INDEX",
    vu.DmaMapFlags: "VFIO_DMA_MAP_FLAG_{}",
    vu.DmaUnmapFlags: "VFIO_DMA_UNMAP_FLAG_{}",
    vu.RegionInfoCap: "VFIO_REGION_INFO_CAP_{}",
    vu.DeviceFeatureFlags: "VFIO_DEVICE_FEATURE_{}",
    vu.DeviceFeature: "VFIO_DEVICE_FEATURE_{}",
    vu.DirtyPagesFlags: "VFIO_IOMMU_DIRTY_PAGES_FLAG_{}",
}


@pytest.mark.parametrize("ours", FLAGS, ids=lambda ours: ours.__name__)
def test_constants(ours: type[enum.IntEnum] | type[enum.IntFlag]) -> None:
    expected = {member.name: VFIO[FLAGS[ours].format(member.name)] for member in ours}
    assert {member.name: int(member) for member in ours} == expected


def test_the_numbers_of_regions_and_irqs() -> None:
    assert len(vu.PciRegion) == VFIO["VFIO_PCI_NUM_REGIONS"]
    assert len(vu.PciIrq) == VFIO["VFIO_PCI_NUM_IRQS"]
    assert VFIO["VFIO_DEVICE_FEATURE_MASK"] == vu.DEVICE_FEATURE_MASK


def test_ioeventfd_flags() -> None:
    # linux/kvm.h gives bit numbers in an enum, the masks are made of those
    for flag in vu.IoEventFdFlags:
        assert int(flag) == 1 << KVM[f"kvm_ioeventfd_flag_nr_{str(flag.name).lower()}"]
