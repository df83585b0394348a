"""PCI Local Bus 3.0 §6 (header, MSI-X), PCI PM 1.2 §3.2 and PCIe 4.0 §7.5.3: config space and capabilities.

Register and bit names are those of linux/pci_regs.h without the prefix, which each docstring gives: the field
``command`` of `TYPE0_HEADER` is ``PCI_COMMAND``, `PciCommand.MASTER` is ``PCI_COMMAND_MASTER``.
"""

from enum import IntEnum, IntFlag

from construct import Array, Const, Int8ul, Int16ul, Int24ul, Int32ul, Struct

CFG_SPACE_SIZE = 256
"""Bytes of a conventional function's config space (PCI_CFG_SPACE_SIZE)."""

CFG_SPACE_EXP_SIZE = 4096
"""Bytes of a PCI Express function's config space (PCI_CFG_SPACE_EXP_SIZE)."""

STD_HEADER_SIZEOF = 64
"""Bytes of the type-0 header; capabilities start behind it (PCI_STD_HEADER_SIZEOF)."""

STD_NUM_BARS = 6
"""Base address registers of a type-0 header (PCI_STD_NUM_BARS)."""

TYPE0_HEADER = Struct(  # 64 bytes; PCI_<NAME>
    "vendor_id" / Int16ul,
    "device_id" / Int16ul,
    "command" / Int16ul,
    "status" / Int16ul,
    "revision_id" / Int8ul,
    "class_prog" / Int8ul,
    "class_device" / Int16ul,
    "cache_line_size" / Int8ul,
    "latency_timer" / Int8ul,
    "header_type" / Int8ul,
    "bist" / Int8ul,
    "base_address" / Array(STD_NUM_BARS, Int32ul),
    "cardbus_cis" / Int32ul,
    "subsystem_vendor_id" / Int16ul,
    "subsystem_id" / Int16ul,
    "rom_address" / Int32ul,
    "capability_list" / Int8ul,
    "reserved" / Array(7, Int8ul),
    "interrupt_line" / Int8ul,
    "interrupt_pin" / Int8ul,
    "min_gnt" / Int8ul,
    "max_lat" / Int8ul,
)


class PciCommand(IntFlag):
    """Bits of ``command`` (PCI_COMMAND_*)."""

    IO = 0x001
    MEMORY = 0x002
    MASTER = 0x004
    SPECIAL = 0x008
    INVALIDATE = 0x010
    VGA_PALETTE = 0x020
    PARITY = 0x040
    WAIT = 0x080
    SERR = 0x100
    FAST_BACK = 0x200
    INTX_DISABLE = 0x400


class PciStatus(IntFlag):
    """Bits of ``status`` (PCI_STATUS_*); those from PARITY on, but for DEVSEL, are cleared by writing 1."""

    IMM_READY = 0x0001
    INTERRUPT = 0x0008
    CAP_LIST = 0x0010
    PARITY = 0x0100
    SIG_TARGET_ABORT = 0x0800
    REC_TARGET_ABORT = 0x1000
    REC_MASTER_ABORT = 0x2000
    SIG_SYSTEM_ERROR = 0x4000
    DETECTED_PARITY = 0x8000


class BaseAddress(IntFlag):
    """Low bits of a base address register (PCI_BASE_ADDRESS_*)."""

    SPACE_IO = 0x1
    MEM_TYPE_64 = 0x4
    MEM_PREFETCH = 0x8


ROM_ADDRESS_ENABLE = 0x01
"""Bit of ``rom_address``: the ROM is decoded (PCI_ROM_ADDRESS_ENABLE)."""

ROM_SIGNATURE = b"\x55\xaa"
"""First bytes of each image of an expansion ROM (§6.3.1.1)."""

ROM_PCIR_POINTER = 0x18
"""Where an image has the 16-bit offset of its `ROM_PCIR`."""

ROM_PCIR = Struct(  # 24 bytes: the PCI data structure of an image of an expansion ROM (§6.3.1.2)
    "signature" / Const(b"PCIR"),
    "vendor_id" / Int16ul,
    "device_id" / Int16ul,
    "device_list" / Int16ul,
    "length" / Int16ul,
    "revision" / Int8ul,
    "class_code" / Int24ul,
    "image_length" / Int16ul,  # in 512 bytes
    "code_revision" / Int16ul,
    "code_type" / Int8ul,
    "indicator" / Int8ul,
    "reserved" / Int16ul,
)


class CapId(IntEnum):
    """First byte of a capability (PCI_CAP_ID_*)."""

    PM = 0x01
    MSI = 0x05
    VNDR = 0x09
    EXP = 0x10
    MSIX = 0x11


CAP_HEADER = Struct(  # 2 bytes: PCI_CAP_LIST_<NAME>; next is 0 in the last one
    "id" / Int8ul,
    "next" / Int8ul,
)

VNDR_CAP_HEADER = Struct(  # 3 bytes; the vendor's own bytes follow (PCI 3.0 §6.7, appendix H)
    "id" / Int8ul,
    "next" / Int8ul,
    "length" / Int8ul,
)

MSI_CAP = Struct(  # 24 bytes: PCI_MSI_<NAME>, the form with 64-bit addresses and masks
    "id" / Int8ul,
    "next" / Int8ul,
    "flags" / Int16ul,
    "address_lo" / Int32ul,
    "address_hi" / Int32ul,
    "data_64" / Int16ul,
    "reserved" / Int16ul,
    "mask_64" / Int32ul,
    "pending_64" / Int32ul,
)


class MsiFlags(IntFlag):
    """Bits of ``flags``, the message control register (PCI_MSI_FLAGS_*).

    QMASK holds how many vectors there are, QSIZE how many the driver grants, each as a power of two.
    """

    ENABLE = 0x0001
    QMASK = 0x000E
    QSIZE = 0x0070
    MASKBIT = 0x0100


MSI_FLAGS_64BIT = 0x0080
"""Bit of ``flags`` beside those of `MsiFlags`: the form with 64-bit addresses (PCI_MSI_FLAGS_64BIT)."""

MSI_MAX_VECTORS = 32

PM_CAP = Struct(  # 8 bytes: PCI_PM_<NAME>
    "id" / Int8ul,
    "next" / Int8ul,
    "pmc" / Int16ul,
    "ctrl" / Int16ul,
    "ppb_extensions" / Int8ul,
    "data_register" / Int8ul,
)

PM_CAP_VERSION = 3
"""``pmc`` bits 2:0 of PCI PM 1.2."""


class PmCtrl(IntFlag):
    """Bits of ``ctrl``, the power management control and status register (PCI_PM_CTRL_*)."""

    STATE_MASK = 0x0003
    NO_SOFT_RESET = 0x0008


class PowerState(IntEnum):
    """Values of `PmCtrl.STATE_MASK`; D1 and D2 are optional and absent here."""

    D0 = 0
    D3HOT = 3


MSIX_CAP = Struct(  # 12 bytes: PCI_MSIX_<NAME>
    "id" / Int8ul,
    "next" / Int8ul,
    "flags" / Int16ul,
    "table" / Int32ul,
    "pba" / Int32ul,
)


class MsixFlags(IntFlag):
    """Bits of ``flags``, the message control register (PCI_MSIX_FLAGS_*); QSIZE holds the vector count less one."""

    QSIZE = 0x07FF
    MASKALL = 0x4000
    ENABLE = 0x8000


MSIX_MAX_VECTORS = MsixFlags.QSIZE + 1

MSIX_ENTRY = Struct(  # 16 bytes: PCI_MSIX_ENTRY_<NAME>
    "lower_addr" / Int32ul,
    "upper_addr" / Int32ul,
    "data" / Int32ul,
    "vector_ctrl" / Int32ul,
)

MSIX_ENTRY_SIZE = 16
"""PCI_MSIX_ENTRY_SIZE."""

MSIX_ENTRY_CTRL_MASKBIT = 1
"""The only defined bit of ``vector_ctrl``; set at power-on (PCI_MSIX_ENTRY_CTRL_MASKBIT)."""

EXP_CAP = Struct(  # 60 bytes, version 2: PCI_EXP_<NAME>
    "id" / Int8ul,
    "next" / Int8ul,
    "flags" / Int16ul,
    "devcap" / Int32ul,
    "devctl" / Int16ul,
    "devsta" / Int16ul,
    "lnkcap" / Int32ul,
    "lnkctl" / Int16ul,
    "lnksta" / Int16ul,
    "sltcap" / Int32ul,
    "sltctl" / Int16ul,
    "sltsta" / Int16ul,
    "rtctl" / Int16ul,
    "rtcap" / Int16ul,
    "rtsta" / Int32ul,
    "devcap2" / Int32ul,
    "devctl2" / Int16ul,
    "devsta2" / Int16ul,
    "lnkcap2" / Int32ul,
    "lnkctl2" / Int16ul,
    "lnksta2" / Int16ul,
    "sltcap2" / Int32ul,
    "sltctl2" / Int16ul,
    "sltsta2" / Int16ul,
)

EXT_CAP_HEADER = Struct("header" / Int32ul)  # PCI_EXT_CAP_*: id in bits 15:0, version in 19:16, next in 31:20


EXT_CAP_VERSION_SHIFT, EXT_CAP_NEXT_SHIFT = 16, 20


class ExtCapId(IntEnum):
    """Bits 15:0 of an extended capability (PCI_EXT_CAP_ID_*)."""

    DSN = 0x03
    VNDR = 0x0B


DSN_CAP = Struct(  # 12 bytes: the device serial number (PCIe 4.0 §7.9.3)
    "header" / Int32ul,
    "sn_lo" / Int32ul,
    "sn_hi" / Int32ul,
)

EXT_VNDR_CAP_HEADER = Struct(  # 8 bytes; the vendor's own bytes follow (PCIe 4.0 §7.9.5)
    "header" / Int32ul,
    "vndr_header" / Int32ul,  # PCI_VNDR_HEADER_*: id in bits 15:0, revision in 19:16, length in 31:20
)

EXP_CAP_VERSION = 2
"""``flags`` bits 3:0; bits 7:4 are the port type, 0 of which is an endpoint (PCI_EXP_TYPE_ENDPOINT)."""


class ExpDevCap(IntFlag):
    """Bits of ``devcap`` (PCI_EXP_DEVCAP_*)."""

    RBER = 0x0000_8000
    FLR = 0x1000_0000


class ExpDevCtl(IntFlag):
    """Bits of ``devctl`` (PCI_EXP_DEVCTL_*)."""

    CERE = 0x0001
    NFERE = 0x0002
    FERE = 0x0004
    URRE = 0x0008
    RELAX_EN = 0x0010
    PAYLOAD = 0x00E0
    NOSNOOP_EN = 0x0800
    READRQ = 0x7000
    READRQ_512B = 0x2000
    BCR_FLR = 0x8000


class ExpDevSta(IntFlag):
    """Bits of ``devsta`` that are cleared by writing 1 (PCI_EXP_DEVSTA_*)."""

    CED = 0x1
    NFED = 0x2
    FED = 0x4
    URD = 0x8


class ExpLnkCap(IntFlag):
    """Bits of ``lnkcap`` (PCI_EXP_LNKCAP_*)."""

    SLS_2_5GB = 0x0000_0001


class ExpLnkCtl(IntFlag):
    """Bits of ``lnkctl`` (PCI_EXP_LNKCTL_*)."""

    ASPMC = 0x0003
    RCB = 0x0008
    CCC = 0x0040
    ES = 0x0080


class ExpLnkSta(IntFlag):
    """Bits of ``lnksta`` (PCI_EXP_LNKSTA_*)."""

    CLS_2_5GB = 0x0001
    NLW_X1 = 0x0010


class ExpDevCap2(IntFlag):
    """Bits of ``devcap2`` (PCI_EXP_DEVCAP2_*)."""

    COMP_TMOUT_DIS = 0x0000_0010


class ExpDevCtl2(IntFlag):
    """Bits of ``devctl2`` (PCI_EXP_DEVCTL2_*)."""

    COMP_TMOUT_DIS = 0x0010


class ExpLnkCap2(IntFlag):
    """Bits of ``lnkcap2`` (PCI_EXP_LNKCAP2_*)."""

    SLS_2_5GB = 0x0000_0002


class ExpLnkCtl2(IntFlag):
    """Bits of ``lnkctl2`` (PCI_EXP_LNKCTL2_*)."""

    TLS_2_5GT = 0x0001
