"""Formats of NVM Express: commands and completions, status codes, and the structures that Identify and logs give.

Facts: NVM Express Base Specification 2.0c ("Base"), NVM Command Set Specification 1.0c ("NVM"). They describe a
controller of version 1.4 with few optional commands.
"""

import struct
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

VERSION = 0x0001_0400
PAGE = 4096
"""Memory page; CAP.MPSMIN and CAP.MPSMAX say that there is no other size."""
FIRMWARE = b"1       "
WARNING_KELVIN = 343
NAMESPACE = 1
ALL_NAMESPACES = 0xFFFF_FFFF
ENTRY, COMPLETION = 64, 16
"""Bytes of the entries of queues: CC.IOSQES 6, CC.IOCQES 4 (Base §4.1, §4.2)."""


class Command(NamedTuple):
    """Submission queue entry (Base §3.3.3.1, figure 88)."""

    opcode: int
    flags: int
    """FUSE in bits 1:0, PSDT in bits 7:6; both are 0 for what is known here."""
    cid: int
    nsid: int
    cdw2: int
    metadata: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int


COMMAND = struct.Struct("<BBHIQQQQ6I")
RANGE = struct.Struct("<IIQ")
"""Range of Dataset Management: context attributes, length, first block (NVM §3.2.3)."""


class Admin(IntEnum):
    """Opcodes of the admin queue (Base §5, figure 138)."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    DOORBELL_BUFFER_CONFIG = 0x7C


class Io(IntEnum):
    """Opcodes of other queues (NVM §3)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class Feature(IntEnum):
    """Feature identifiers (Base §5.27.1, NVM §4.1.3)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B


DO_NOT_RETRY = 1 << 14


class Status(IntEnum):
    """Status code type in bits 10:8, status code in bits 7:0 (Base §3.3.3.2.1)."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    INVALID_NAMESPACE = 0x00B
    PRP_OFFSET_INVALID = 0x013
    WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    COMPLETION_QUEUE_INVALID = 0x100
    INVALID_QUEUE_IDENTIFIER = 0x101
    INVALID_QUEUE_SIZE = 0x102
    TOO_MANY_ASYNC_EVENTS = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    WRITE_FAULT = 0x280
    READ_ERROR = 0x281


class Failed(Exception):
    """Command that ends with this status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


def identify_controller(
    vendor: int,
    serial: str,
    uuid: UUID,
    *,
    transfer: int,
    events: int,
    errors: int,
    shadow: bool,
    writable: bool,
    discards: bool,
) -> bytes:
    """Identify Controller data structure (Base §5.17.2.1, figure 275).

    ``transfer`` is MDTS; ``events`` and ``errors`` are numbers of requests and log entries.
    """
    data = bytearray(PAGE)
    model, number = b"vfiouser-virtio NVMe".ljust(40), serial.encode("ascii", "replace").ljust(20)
    struct.pack_into("<HH20s40s8s", data, 0, vendor, vendor, number, model, FIRMWARE)
    data[72] = 6  # RAB
    data[77] = transfer
    struct.pack_into("<III", data, 80, VERSION, 0, 30_000_000)  # RTD3E: a shutdown may take 30 s
    data[111] = 1  # CNTRLTYPE: I/O
    struct.pack_into("<H", data, 256, 0x0100 if shadow else 0)  # OACS: Doorbell Buffer Config
    data[258], data[259] = 3, events - 1  # ACL, AERL
    data[260] = 0x03  # FRMW: one slot, which is read-only
    data[261] = 0x06  # LPA: commands and effects, extended data
    data[262] = errors - 1  # ELPE
    struct.pack_into("<HH", data, 266, WARNING_KELVIN, WARNING_KELVIN + 10)  # WCTEMP, CCTEMP
    data[512], data[513] = 0x66, 0x44
    struct.pack_into("<I", data, 516, 1)  # NN
    struct.pack_into("<H", data, 520, (0x08 if writable else 0) | (0x04 if discards else 0))  # ONCS
    data[525] = 1  # VWC: there is a volatile write cache
    struct.pack_into("<256s", data, 768, f"nqn.2014-08.org.nvmexpress:uuid:{uuid}".encode())
    struct.pack_into("<H", data, 2048, 2500)  # PSD0: 25 W
    return bytes(data)


def identify_namespace(blocks: int, block_size: int, *, readonly: bool, discard_blocks: int) -> bytes:
    """Identify Namespace data structure (NVM §4.1.5.1, figure 97)."""
    data = bytearray(PAGE)
    struct.pack_into("<QQQ", data, 0, blocks, blocks, blocks)
    if discard_blocks:
        data[24] = 0x10  # NSFEAT.OPTPERF: the fields from NPWG on
        struct.pack_into("<5H", data, 64, *[discard_blocks - 1] * 4, 0)
    data[99] = 0x01 if readonly else 0  # NSATTR: write protected
    struct.pack_into("<I", data, 128, (block_size.bit_length() - 1) << 16)  # LBAF0
    return bytes(data)


def namespace_descriptors(uuid: UUID) -> bytes:
    """Namespace Identification Descriptor list (Base §5.17.2.3): a UUID, and the NVM command set."""
    return (struct.pack("<BBxx16s", 3, 16, uuid.bytes) + struct.pack("<BBxxB", 4, 1, 0)).ljust(PAGE, b"\0")


def commands_and_effects(*, writable: bool, discards: bool) -> bytes:
    """Commands Supported and Effects log page (Base §5.16.1.6): bit 0, it is supported; bit 1, it changes blocks."""
    data = bytearray(PAGE)
    for opcode in Admin:
        data[4 * opcode] = 1
    for each in Io:
        changes = each in (Io.WRITE, Io.WRITE_ZEROES, Io.DATASET_MANAGEMENT)
        if not changes or (discards if each == Io.DATASET_MANAGEMENT else writable):
            data[1024 + 4 * each] = 3 if changes else 1
    return bytes(data)
