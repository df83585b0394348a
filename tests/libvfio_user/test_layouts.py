"""The structs and constants of the bindings: against the protocol's, known sizes, and the header where it is."""

import ctypes
import enum
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfiouser_virtio.libvfio_user import bindings
from vfiouser_virtio.libvfio_user.bindings import (
    PROTOTYPES,
    CapFlag,
    CtxFlag,
    DevType,
    DmaInfo,
    DmaInfoStruct,
    Functions,
    Iovec,
    Library,
    MigrationCallbacks,
    MigrState,
    PciType,
    RegionFlag,
    ResetType,
    SglFlag,
    Trans,
)
from vfiouser_virtio.protocols import pci
from vfiouser_virtio.protocols.vfio_user import PciIrq, PciRegion, RegionFlags

C_NAMES: dict[type[enum.IntEnum | enum.IntFlag], str] = {
    Trans: "VFU_TRANS_",
    DevType: "VFU_DEV_TYPE_",
    CtxFlag: "LIBVFIO_USER_FLAG_",
    RegionFlag: "VFU_REGION_FLAG_",
    ResetType: "VFU_RESET_",
    MigrState: "VFU_MIGR_STATE_",
    SglFlag: "VFU_SGL_",
    PciType: "VFU_PCI_TYPE_",
    CapFlag: "VFU_CAP_FLAG_",
}
RENAMED = {"BITS_64": "64_BITS"}
STRUCTS: dict[str, tuple[type[ctypes.Structure], int]] = {
    "struct iovec": (Iovec, 16),
    "vfu_dma_info_t": (DmaInfoStruct, 56),
    "vfu_migration_callbacks_t": (MigrationCallbacks, 32),
}


@pytest.mark.parametrize(("kind", "size"), STRUCTS.values(), ids=STRUCTS.keys())
def test_every_struct_has_the_size_that_the_library_has(kind: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(kind) == size


def test_indexes_are_those_of_the_protocol() -> None:
    assert (bindings.PciDevRegion, bindings.DevIrqType) == (PciRegion, PciIrq)
    assert (len(PciRegion), len(PciIrq)) == (bindings.PCI_DEV_NUM_REGIONS, bindings.DEV_NUM_IRQS)
    assert int(RegionFlag.RW) == RegionFlags.READ | RegionFlags.WRITE


def test_both_lists_of_functions_are_one() -> None:
    assert list(PROTOTYPES) == list(Functions.__annotations__)
    for name, prototype in PROTOTYPES.items():
        parameters = Functions.__annotations__[name].__args__[:-1]
        # vfu_log is variadic: with the one string that its format takes.
        assert len(parameters) == len(prototype.argtypes) + (name == "vfu_log"), name


def test_a_region_without_memory_says_so() -> None:
    info = DmaInfoStruct(Iovec(0x1000, 0x2000), None, Iovec(None, 0), 4096, 3)
    assert DmaInfo.from_struct(info) == DmaInfo(0x1000, 0x2000, None, None, 4096, 3)
    info = DmaInfoStruct(Iovec(None, 0x2000), 0x7000_0100, Iovec(0x7000_0000, 0x3000), 4096, 1)
    assert DmaInfo.from_struct(info) == DmaInfo(0, 0x2000, 0x7000_0100, (0x7000_0000, 0x3000), 4096, 1)


# --- Against the header ---------------------------------------------------------------------------------------------


@pytest.fixture
def include(libvfio_user: Library) -> Path:
    """The folder of libvfio-user.h: in the tree that the library was built in, or the system's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to read libvfio-user.h with")
    above = Path(libvfio_user.path).resolve().parents
    for folder in (*(parent / "include" for parent in above), Path("/usr/include/vfio-user")):
        if (folder / "libvfio-user.h").exists():
            return folder
    pytest.skip("libvfio-user.h is not with the library")


def evaluated(include: Path, folder: Path, expressions: list[str]) -> list[int]:
    """What a C compiler makes of integer expressions."""
    source = folder / "evaluate.c"
    lines = "".join(f'printf("%lld\\n", (long long)({expression}));\n' for expression in expressions)
    source.write_text(
        "#include <stdbool.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <libvfio-user.h>\n"
        f"int main(void) {{\n{lines}return 0;\n}}\n"
    )
    program = folder / "evaluate"
    subprocess.run(["cc", "-w", "-I", str(include), "-o", str(program), str(source)], check=True)
    return [int(line) for line in subprocess.run([str(program)], check=True, capture_output=True).stdout.split()]


def test_constants_are_those_of_the_header(libvfio_user: Library, include: Path, tmp_path: Path) -> None:
    expected = {
        f"{prefix}{RENAMED.get(name, name)}": int(member)
        for kind, prefix in C_NAMES.items()
        for name, member in kind.__members__.items()
    }
    for name in ("MIGR_CALLBACKS_VERS", "PCI_DEV_NUM_REGIONS", "GENERIC_DEV_MIGR_REGION_IDX", "DEV_NUM_IRQS"):
        expected[f"VFU_{name}"] = getattr(bindings, name)
    expected["VFU_GENERIC_DEV_NUM_REGIONS"] = bindings.GENERIC_DEV_NUM_REGIONS
    expected["LIBVFIO_USER_MAX_DMA_REGIONS"] = bindings.MAX_DMA_REGIONS
    for name in ("LIB_VFIO_USER_MAJOR", "LIB_VFIO_USER_MINOR"):
        expected[name] = getattr(bindings, name)
    expected |= {f"VFU_DEV_{irq.name}_IRQ": int(irq) for irq in PciIrq}
    shortened = {"CONFIG": "CFG"}
    expected |= {f"VFU_PCI_DEV_{shortened.get(r.name, r.name)}_REGION_IDX": int(r) for r in PciRegion}
    if "5d64ebf or later" not in libvfio_user.version:
        del expected["VFU_SGL_DIRECT_ACCESS"]
    assert dict(zip(expected, evaluated(include, tmp_path, list(expected)), strict=True)) == expected


def test_structs_are_laid_out_as_in_the_header(include: Path, tmp_path: Path) -> None:
    expected = {f"sizeof({name})": ctypes.sizeof(kind) for name, (kind, _) in STRUCTS.items()}
    for name, (kind, _) in STRUCTS.items():
        for field, *_ in kind._fields_:
            expected[f"offsetof({name}, {field})"] = getattr(kind, str(field)).offset
    for name, schema in {
        "struct msixcap": pci.MSIX_CAP,
        "struct msicap": pci.MSI_CAP,
        "struct pmcap": pci.PM_CAP,
        "struct pxcap": pci.EXP_CAP,
        "struct dsncap": pci.DSN_CAP,
        "struct vsc": pci.VNDR_CAP_HEADER,
        "struct pcie_ext_cap_hdr": pci.EXT_CAP_HEADER,
        "struct pcie_ext_cap_vsc_hdr": pci.EXT_VNDR_CAP_HEADER,
        "vfu_pci_hdr_t": pci.TYPE0_HEADER,
    }.items():
        expected[f"sizeof({name})"] = schema.sizeof()
    assert dict(zip(expected, evaluated(include, tmp_path, list(expected)), strict=True)) == expected


def test_every_function_of_the_header_is_there(include: Path) -> None:
    text = re.sub(r"/\*.*?\*/", "", (include / "libvfio-user.h").read_text(), flags=re.DOTALL)
    declared = set(re.findall(r"^(?:\w+ \**)?((?:vfu|dma)_\w+)\(", text, flags=re.MULTILINE))
    assert declared == set(PROTOTYPES)
