"""Memory balloon (virtio 1.4, 5.5): configuration, statistics, feature bits."""

from enum import IntEnum

from construct import Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, Exercise, RequestShape, no_complaint
from vfiouser_virtio.protocols.virtio.features import FeatureBit
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.BALLOON
PAGE_SIZE = 4096
"""The unit of `num_pages`, `actual` and page numbers: "historical, and independent of the guest page size" (5.5.6)."""


class BalloonFeature(FeatureBit):
    """Feature bits, by number (5.5.3): ``VIRTIO_BALLOON_F_*``; Linux's header calls the last one REPORTING."""

    MUST_TELL_HOST = 0
    STATS_VQ = 1
    DEFLATE_ON_OOM = 2
    FREE_PAGE_HINT = 3
    PAGE_POISON = 4
    PAGE_REPORTING = 5


class CommandId(IntEnum):
    """Reserved values of ``free_page_hint_cmd_id`` (5.5.6.6): ``VIRTIO_BALLOON_CMD_ID_*``."""

    STOP = 0
    DONE = 1


class Stat(IntEnum):
    """``tag`` of a statistic (5.5.6.5): ``VIRTIO_BALLOON_S_*``; from OOM_KILL on Linux 6.12's, in events and pages."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJFLT = 2
    MINFLT = 3
    MEMFREE = 4
    MEMTOT = 5
    AVAIL = 6
    CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9
    OOM_KILL = 10
    ALLOC_STALL = 11
    ASYNC_SCAN = 12
    DIRECT_SCAN = 13
    ASYNC_RECLAIM = 14
    DIRECT_RECLAIM = 15


# struct virtio_balloon_config (5.5.4).
CONFIG = Struct("num_pages" / Int32ul, "actual" / Int32ul, "free_page_hint_cmd_id" / Int32ul, "poison_val" / Int32ul)
Config = record(CONFIG)

# A page of an inflate or deflate request: its address divided by PAGE_SIZE.
PFN = Struct("pfn" / Int32ul)
PFN_CODEC = codec(PFN)
# struct virtio_balloon_stat: of these 10 bytes each.
STAT = Struct("tag" / Int16ul, "val" / Int64ul)
STAT_CODEC = codec(STAT)

# The fuzzer's RAM lies in the first MiB and around.
_PFNS = (*range(512), 0xFFFF_FFFF)

TYPE = DeviceType(
    "balloon",
    CONFIG,
    BalloonFeature,
    queues=("inflateq", "deflateq", "statsq", "free_page_vq", "reporting_vq"),
    device_id=DEVICE_ID,
    device_fills=("statsq",),
    takes_pages=True,
    queue_features={
        "statsq": BalloonFeature.STATS_VQ,
        "free_page_vq": BalloonFeature.FREE_PAGE_HINT,
        "reporting_vq": BalloonFeature.PAGE_REPORTING,
    },
    linux_modules=("virtio_balloon",),
    # A page that was not given: to deflate it changes nothing.
    exercise=Exercise("balloon", 1, bytes(PFN.sizeof()), 0, no_complaint),
    requests=(
        RequestShape(
            queues=(0, 1), entry=PFN, usual={"pfn": _PFNS}, counts=(0, 1, 1, 8, 256, 300), payload=(0, 0, 0, 1, 3)
        ),
        RequestShape(
            queues=(2,), entry=STAT, usual={"tag": (*Stat, 99)}, counts=(0, 1, 10, 16, 500), payload=(0, 0, 1, 9)
        ),
        RequestShape(queues=(3,), header=Struct("id" / Int32ul), usual={"id": (*CommandId, 2, 3)}, payload=(0, 0, 4)),
        RequestShape(queues=(3, 4), payload=(0, 0, 0, 4), writable=(0, 1, 4096, 8192, 65536)),
    ),
)
