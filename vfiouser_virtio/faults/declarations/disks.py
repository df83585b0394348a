"""Declarations: faults of disks."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer, operation, seconds

_REQUEST, _READ, _WRITE = "read or write of the disk", "read of the disk", "write to the disk"

DISKS = (
    Fault(
        "io-error", Place.BLK, "read or write that touches it",
        "a request fails with VIRTIO_BLK_S_IOERR, and nothing of it is done",
        "none: a driver has to cope with errors", "5.2.6",
        (
            Argument("sector", integer, None, "the first sector (of 512 bytes) that is bad; default: all"),
            Argument("sectors", integer, 1, "how many are bad"),
            Argument("op", operation, "any", "read, write or any"),
        ), devices="blk",
    ),
    Fault(
        "read-short", Place.BLK, _READ, "only the first half of the data is read, and the status is OK",
        "the device reads the whole request, or fails it", "5.2.6.2", devices="blk",
    ),
    Fault(
        "read-flipped", Place.BLK, _READ, "one bit of the data is wrong",
        "what is read is what was written", "5.2.6", devices="blk",
    ),
    Fault(
        "write-torn", Place.BLK, _WRITE, "only the first sectors are stored, and the status is OK",
        "the device writes the whole request, or fails it", "5.2.6.2",
        (Argument("keep", integer, None, "bytes that are stored, in whole sectors; default: half of them"),),
        devices="blk",
    ),
    Fault(
        "write-dropped", Place.BLK, _WRITE,
        "the write is done, and seen by reads, but gone after the next reset, unless it was flushed before",
        "none, with a volatile cache: a driver has to flush", "5.2.6.2", devices="blk",
    ),
    Fault(
        "flush-ignored", Place.BLK, "flush",
        "the flush makes nothing durable: what write-dropped keeps back may still be dropped",
        "what was completed before a flush is stable after it", "5.2.6.2", devices="blk",
    ),
    Fault(
        "disk-slow", Place.BLK, _REQUEST, "the request begins later",
        "none: a driver has to wait", "5.2.6", (Argument("time", seconds, 1.0, "how much later"),), devices="blk",
    ),
)  # fmt: skip
