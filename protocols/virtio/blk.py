"""Block device (virtio 1.4, 5.2): configuration, requests, feature bits; names of linux/virtio_blk.h."""

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Any

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, Exercise, RequestShape
from vfiouser_virtio.protocols.virtio.features import FeatureBit
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.BLOCK
# The unit of `capacity` and of every sector number, whatever the block size (5.2.4).
SECTOR_SIZE = 512
# VIRTIO_BLK_ID_BYTES: length of the string that GET_ID returns; shorter ones are padded with zeros (5.2.6).
ID_BYTES = 20


class BlkFeature(FeatureBit):
    """Feature bits, by number (5.2.3): ``VIRTIO_BLK_F_*``."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16
    ZONED = 17


class RequestType(IntEnum):
    """``type`` of a request (5.2.6): ``VIRTIO_BLK_T_*``."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14
    ZONE_APPEND = 15
    ZONE_REPORT = 16
    ZONE_OPEN = 18
    ZONE_CLOSE = 20
    ZONE_FINISH = 22
    ZONE_RESET = 24
    ZONE_RESET_ALL = 26


class BlkStatus(IntEnum):
    """Status: the last byte of a request's writable part (5.2.6): ``VIRTIO_BLK_S_*``."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    ZONE_INVALID_CMD = 3
    ZONE_UNALIGNED_WP = 4
    ZONE_OPEN_RESOURCE = 5
    ZONE_ACTIVE_RESOURCE = 6


class SegmentFlags(IntFlag):
    """``flags`` of a `SEGMENT`: ``VIRTIO_BLK_WRITE_ZEROES_FLAG_*``."""

    UNMAP = 1


GEOMETRY = Struct("cylinders" / Int16ul, "heads" / Int8ul, "sectors" / Int8ul)

# struct virtio_blk_zoned_characteristics (5.2.4), behind feature ZONED.
ZONED = Struct(
    "zone_sectors" / Int32ul,
    "max_open_zones" / Int32ul,
    "max_active_zones" / Int32ul,
    "max_append_sectors" / Int32ul,
    "write_granularity" / Int32ul,
    "model" / Int8ul,
    "unused2" / Bytes(3),
)

# struct virtio_blk_config (5.2.4). Lengths ending in _sectors are in sectors of 512 bytes; those of the topology are in
# logical blocks of blk_size bytes. `wce` is the specification's `writeback`.
CONFIG = Struct(
    "capacity" / Int64ul,
    "size_max" / Int32ul,
    "seg_max" / Int32ul,
    "geometry" / GEOMETRY,
    "blk_size" / Int32ul,
    "physical_block_exp" / Int8ul,
    "alignment_offset" / Int8ul,
    "min_io_size" / Int16ul,
    "opt_io_size" / Int32ul,
    "wce" / Int8ul,
    "unused" / Int8ul,
    "num_queues" / Int16ul,
    "max_discard_sectors" / Int32ul,
    "max_discard_seg" / Int32ul,
    "discard_sector_alignment" / Int32ul,
    "max_write_zeroes_sectors" / Int32ul,
    "max_write_zeroes_seg" / Int32ul,
    "write_zeroes_may_unmap" / Int8ul,
    "unused1" / Bytes(3),
    "max_secure_erase_sectors" / Int32ul,
    "max_secure_erase_seg" / Int32ul,
    "secure_erase_sector_alignment" / Int32ul,
    "zoned" / ZONED,
)
Config = record(CONFIG)

# struct virtio_blk_outhdr: what every request begins with (5.2.6).
REQUEST_HEADER = Struct("type" / Int32ul, "ioprio" / Int32ul, "sector" / Int64ul)
REQUEST_HEADER_CODEC = codec(REQUEST_HEADER)

# struct virtio_blk_discard_write_zeroes: the data of DISCARD, WRITE_ZEROES and SECURE_ERASE is an array of these.
SEGMENT = Struct("sector" / Int64ul, "num_sectors" / Int32ul, "flags" / Int32ul)
SEGMENT_CODEC = codec(SEGMENT)


def _complaint(data: bytes, _used: int) -> str:
    status = data[-1]
    return "" if status == BlkStatus.OK else f"reading sector 0 ended with status {status:#x}"


# For requests that are made up: sectors of a disk of 1 MiB, transfers and what is nearly one.
_SECTORS = (*range(2048), 2047, 2048, (1 << 55) - 1, 1 << 55)
_TRANSFERS = (0, 512, 512, 1024, 4096, 10240, 1, 511, 513)


def _shape(weight: int, types: Sequence[int], **more: Any) -> RequestShape:
    usual = {"type": types, "sector": _SECTORS, "num_sectors": (0, 1, 8, 2048), "flags": (0, 0, 1, 2)}
    return RequestShape(queues=(0, 1), header=REQUEST_HEADER, usual=usual, weight=weight, **more)


TYPE = DeviceType(
    "blk",
    CONFIG,
    BlkFeature,
    more=("requestq",),
    device_id=DEVICE_ID,
    requires={BlkFeature.CONFIG_WCE: (BlkFeature.FLUSH,)},  # 5.2.3.1
    pci_class=0x018000,
    qemu_pci_class=0x010000,
    linux_modules=("virtio_blk",),
    exercise=Exercise(
        "block",
        0,
        REQUEST_HEADER_CODEC.pack(RequestType.IN, 0, 0),
        SECTOR_SIZE + 1,
        _complaint,
        last_writable=1,
    ),
    requests=(
        _shape(5, (RequestType.IN,), writable=[size + 1 for size in _TRANSFERS]),
        _shape(5, (RequestType.OUT,), payload=_TRANSFERS, writable=(1,)),
        _shape(
            3,
            (RequestType.DISCARD, RequestType.WRITE_ZEROES, RequestType.SECURE_ERASE),
            entry=SEGMENT,
            counts=(0, 1, 1, 2, 16, 17),
            payload=(0, 0, 0, 1, 8),
            writable=(1,),
        ),
        _shape(1, (RequestType.GET_ID,), writable=(21, 21, 1, 20, 22, 513)),
        _shape(8, tuple(RequestType), writable=(1, 513, 4097, 0)),
    ),
)
