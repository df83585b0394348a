"""protocols/pci.py against linux/pci_regs.h, which we did not write."""

import enum

import construct
import pytest
from support.uapi import defines

from vfiouser_virtio.protocols import pci
from vfiouser_virtio.protocols.codec import Schema, offsets

REGS = defines("linux/pci_regs.h")

HEADER_LAYOUT = {
    "vendor_id": 2, "device_id": 2, "command": 2, "status": 2, "revision_id": 1, "class_prog": 1, "class_device": 2,
    "cache_line_size": 1, "latency_timer": 1, "header_type": 1, "bist": 1, "cardbus_cis": 4, "subsystem_vendor_id": 2,
    "subsystem_id": 2, "rom_address": 4, "capability_list": 1, "interrupt_line": 1, "interrupt_pin": 1, "min_gnt": 1,
    "max_lat": 1,
}  # fmt: skip

REGISTERS = {
    "PCI": (pci.TYPE0_HEADER, {"base_address": "PCI_BASE_ADDRESS_0"}),
    "PCI_CAP_LIST": (pci.CAP_HEADER, {}),
    "PCI_PM": (pci.PM_CAP, {}),
    "PCI_MSI": (pci.MSI_CAP, {}),
    "PCI_MSIX": (pci.MSIX_CAP, {}),
    "PCI_MSIX_ENTRY": (pci.MSIX_ENTRY, {}),
    "PCI_EXP": (pci.EXP_CAP, {}),
}
NOT_IN_LINUX = {("PCI", "reserved"), ("PCI_MSI", "reserved")}

BITS: dict[str, type[enum.IntEnum] | type[enum.IntFlag]] = {
    "PCI_COMMAND": pci.PciCommand,
    "PCI_STATUS": pci.PciStatus,
    "PCI_BASE_ADDRESS": pci.BaseAddress,
    "PCI_CAP_ID": pci.CapId,
    "PCI_EXT_CAP_ID": pci.ExtCapId,
    "PCI_PM_CTRL": pci.PmCtrl,
    "PCI_MSI_FLAGS": pci.MsiFlags,
    "PCI_MSIX_FLAGS": pci.MsixFlags,
    "PCI_EXP_DEVCAP": pci.ExpDevCap,
    "PCI_EXP_DEVCTL": pci.ExpDevCtl,
    "PCI_EXP_DEVSTA": pci.ExpDevSta,
    "PCI_EXP_LNKCAP": pci.ExpLnkCap,
    "PCI_EXP_LNKCTL": pci.ExpLnkCtl,
    "PCI_EXP_LNKSTA": pci.ExpLnkSta,
    "PCI_EXP_DEVCAP2": pci.ExpDevCap2,
    "PCI_EXP_DEVCTL2": pci.ExpDevCtl2,
    "PCI_EXP_LNKCAP2": pci.ExpLnkCap2,
    "PCI_EXP_LNKCTL2": pci.ExpLnkCtl2,
}

NUMBERS = {
    "PCI_CFG_SPACE_SIZE": pci.CFG_SPACE_SIZE,
    "PCI_CFG_SPACE_EXP_SIZE": pci.CFG_SPACE_EXP_SIZE,
    "PCI_STD_HEADER_SIZEOF": pci.STD_HEADER_SIZEOF,
    "PCI_ROM_ADDRESS_ENABLE": pci.ROM_ADDRESS_ENABLE,
    "PCI_STD_NUM_BARS": pci.STD_NUM_BARS,
    "PCI_MSI_FLAGS_64BIT": pci.MSI_FLAGS_64BIT,
    "PCI_MSIX_ENTRY_SIZE": pci.MSIX_ENTRY_SIZE,
    "PCI_MSIX_ENTRY_CTRL_MASKBIT": pci.MSIX_ENTRY_CTRL_MASKBIT,
    "PCI_EXP_TYPE_ENDPOINT": 0,
}

SIZES = {
    "PCI_STD_HEADER_SIZEOF": pci.TYPE0_HEADER,
    "PCI_PM_SIZEOF": pci.PM_CAP,
    "PCI_CAP_MSIX_SIZEOF": pci.MSIX_CAP,
    "PCI_MSIX_ENTRY_SIZE": pci.MSIX_ENTRY,
    "PCI_EXT_CAP_DSN_SIZEOF": pci.DSN_CAP,
}


def registers() -> list[tuple[str, str, int]]:
    found = []
    for prefix, (schema, renamed) in REGISTERS.items():
        own_header = () if prefix in ("PCI", "PCI_CAP_LIST", "PCI_MSIX_ENTRY") else ("id", "next")
        for name, (offset, _) in offsets(schema).items():
            if name not in own_header and (prefix, name) not in NOT_IN_LINUX:
                found.append((prefix, renamed.get(name, f"{prefix}_{name.upper()}"), offset))
    return found


@pytest.mark.parametrize(("prefix", "name", "offset"), registers())
def test_every_field_lies_where_linux_has_it(prefix: str, name: str, offset: int) -> None:
    assert REGS[name] == offset


@pytest.mark.parametrize(("name", "size"), HEADER_LAYOUT.items())
def test_every_header_field_has_the_size_of_its_register(name: str, size: int) -> None:
    assert offsets(pci.TYPE0_HEADER)[name][1] == size


def bits() -> list[tuple[str, int]]:
    return [
        (f"{prefix}_{member}", int(value))
        for prefix, kind in BITS.items()
        for member, value in kind.__members__.items()
    ]


@pytest.mark.parametrize(("name", "value"), bits())
def test_every_bit_is_where_linux_has_it(name: str, value: int) -> None:
    assert REGS[name] == value


@pytest.mark.parametrize(("name", "value"), NUMBERS.items())
def test_every_number_is_that_of_linux(name: str, value: int) -> None:
    assert REGS[name] == value


@pytest.mark.parametrize(("name", "schema"), SIZES.items())
def test_every_structure_has_the_size_that_linux_gives(name: str, schema: Schema) -> None:
    assert REGS[name] == schema.sizeof()


def test_no_enum_of_bits_is_missing_above() -> None:
    ours = {kind for kind in vars(pci).values() if isinstance(kind, enum.EnumMeta) and kind.__module__ == pci.__name__}
    assert ours - set(BITS.values()) == {pci.PowerState}, "PowerState has no #define; every other enum needs a row"


def test_no_schema_is_missing_above() -> None:
    ours = [schema for schema in vars(pci).values() if isinstance(schema, construct.Struct)]
    checked = [schema for schema, _ in REGISTERS.values()]
    # ROMs have no header file; the third byte of one and the words of the others have no #define.
    expected = [pci.ROM_PCIR, pci.VNDR_CAP_HEADER, pci.EXT_CAP_HEADER, pci.DSN_CAP, pci.EXT_VNDR_CAP_HEADER]
    assert [s for s in ours if not any(s is c for c in checked)] == expected, "a schema without a row"
