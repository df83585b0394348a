"""The faults that there are, by name: one declaration each."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, feature_bit, integer, operation, seconds, text

_USED, _SHOWN, _RING = "used buffer", "publication of used buffers", Place.RING

_RINGS = (
    Fault(
        "used-id-out-of-range", _RING, _USED,
        "the used element names a descriptor that the queue does not have; the buffer itself is not given back",
        "id is the index of the head of a chain that the driver made available", "2.7.8",
        (Argument("id", integer, None, "the id; default: the queue's size and up to 999 more"),), of_queue=True,
    ),
    Fault(
        "used-id-not-in-flight", _RING, _USED,
        "the used element names a descriptor that is not the head of a buffer in flight; the buffer is not given back",
        "id is the index of the head of a chain that the driver made available", "2.7.8", of_queue=True,
    ),
    Fault(
        "used-id-of-another", _RING, _USED,
        "the used element names another buffer in flight, if one is not done yet; the right one is not given back",
        "a buffer is used when the device has finished with it", "2.7.8", of_queue=True,
    ),
    Fault(
        "used-twice", _RING, _USED, "the buffer is given back twice, in two used elements that follow each other",
        "a buffer that was made available once is used once", "2.6", of_queue=True,
    ),
    Fault(
        "used-never", _RING, _USED, "the buffer is not given back: the request never ends",
        "the device gives each buffer back that it has finished with", "2.6", of_queue=True,
    ),
    Fault(
        "used-len-long", _RING, _USED, "the used length is more than the buffer has room for",
        "len is the number of bytes that were written into the device-writable part", "2.7.8.1",
        (Argument("len", integer, None, "the length; default: one more than there is room for"),), of_queue=True,
    ),
    Fault(
        "used-len-short", _RING, _USED, "the used length is less than what the device has written",
        "len is the number of bytes that were written into the device-writable part", "2.7.8.1",
        (Argument("len", integer, 0, "the length"),), of_queue=True,
    ),
    Fault(
        "used-late", _RING, _USED, "the buffer is given back later than it could be",
        "none: a driver has to wait", "2.7.8",
        (Argument("time", seconds, 0.1, "how much later"),), of_queue=True,
    ),
    Fault(
        "used-out-of-order", _RING, _USED, "the buffer is given back after the one that is used next",
        "with IN_ORDER buffers are used in the order in which they were made available; else none", "2.7.9",
        (Argument("time", seconds, 1.0, "how long to wait for the next one"),), of_queue=True,
    ),
    Fault(
        "used-storm", _RING, _USED, "buffers are kept back until there are several, and all given back at once",
        "none: a driver has to cope with many at once", "2.7.8",
        (
            Argument("size", integer, 16, "how many at once"),
            Argument("time", seconds, 0.2, "how long to wait for so many"),
        ), of_queue=True,
    ),
    Fault(
        "used-rewritten", _RING, _SHOWN,
        "after the used element is public it is written once more, with another id and length",
        "an element before used.idx belongs to the driver", "2.7.8.1",
        (
            Argument("id", integer, 0xDEAD, "the id it gets"),
            Argument("len", integer, 0xFFFF_FFFF, "the length it gets"),
            Argument("time", seconds, 0.0, "how much later"),
        ), of_queue=True,
    ),
    Fault(
        "used-idx-jump", _RING, _SHOWN, "used.idx moves on by more than was used: old elements count as new ones",
        "idx says where the next element will be written", "2.7.8",
        (Argument("by", integer, 1, "elements too many; negative ones go back"),), of_queue=True, ring="split",
    ),
    Fault(
        "used-idx-early", _RING, _SHOWN, "used.idx moves before the element is written",
        "the device writes the element before it updates idx", "2.7.8.1",
        (Argument("time", seconds, 0.1, "how much later the element comes"),), of_queue=True, ring="split",
    ),
    Fault(
        "used-flags-set", _RING, "look at the ring",
        "NO_NOTIFY is set in used.flags although EVENT_IDX was negotiated",
        "with EVENT_IDX the device sets used.flags to 0", "2.7.10.2", of_queue=True, ring="split",
    ),
    Fault(
        "packed-wrap-flipped", _RING, _USED, "the flags of the used descriptor are those of the other wrap counter",
        "a used descriptor has the device's wrap counter in AVAIL and USED", "2.8.1", of_queue=True, ring="packed",
    ),
    Fault(
        "packed-gap", _RING, _USED, "the used descriptor is written one place further on than the driver looks",
        "used descriptors are written in ring order, without gaps", "2.8.6",
        (Argument("by", integer, 1, "places too far"),), of_queue=True, ring="packed",
    ),
    Fault(
        "notify-not-asked", _RING, "wish for a notification",
        "the device does not ask to be notified, and waits for a notification all the same",
        "a device that waits for buffers has asked for notifications", "2.7.10.2", of_queue=True,
    ),
)  # fmt: skip

_INTERRUPT = "interrupt of a queue"
_INTERRUPTS = (
    Fault(
        "interrupt-lost", Place.INTERRUPT, _INTERRUPT, "a used buffer notification is not sent",
        "using a buffer is notified unless the driver has suppressed that", "2.7.7", of_queue=True,
    ),
    Fault(
        "interrupt-late", Place.INTERRUPT, _INTERRUPT, "a used buffer notification comes later than the used buffer",
        "none: a driver has to wait", "2.7.7", (Argument("time", seconds, 0.1, "how much later"),), of_queue=True,
    ),
    Fault(
        "interrupt-storm", Place.INTERRUPT, _INTERRUPT, "one used buffer notification becomes many (of 64 at a time)",
        "SHOULD NOT notify when nothing was used", "2.7.7",
        (
            Argument("times", integer, 1000, "how many, up to 100000"),
            Argument("time", seconds, 0.001, "between two of them"),
        ), of_queue=True,
    ),
    Fault(
        "interrupt-wrong-vector", Place.INTERRUPT, _INTERRUPT,
        "the notification comes as that of another queue, or as one of a configuration change",
        "a notification is sent with the vector that the driver has mapped for it", "4.1.5.3",
        (Argument("to", integer, -1, "the other queue; -1 is the configuration"),), of_queue=True,
    ),
    Fault(
        "interrupt-unwanted", Place.INTERRUPT, _SHOWN,
        "a used buffer notification is sent although the driver has suppressed it",
        "SHOULD NOT notify when the driver has suppressed that", "2.7.7.2", of_queue=True,
    ),
    Fault(
        "interrupt-spurious", Place.INTERRUPT, "notification of the driver",
        "a used buffer notification is sent while nothing was used",
        "SHOULD NOT notify when nothing was used", "2.7.7", of_queue=True,
    ),
    Fault(
        "interrupt-early", Place.INTERRUPT, "enabling of a queue",
        "a used buffer notification is sent before DRIVER_OK",
        "no notifications before DRIVER_OK", "2.1.2", of_queue=True,
    ),
    Fault(
        "config-interrupt-spurious", Place.INTERRUPT, "notification of the driver",
        "a configuration change notification is sent while nothing has changed",
        "none: a driver has to compare", "2.3", of_queue=True,
    ),
    Fault(
        "config-interrupt-lost", Place.INTERRUPT, "configuration change notification",
        "a configuration change is not notified", "a change is notified after DRIVER_OK", "2.3",
    ),
)  # fmt: skip

_CONFIGURATION = (
    Fault(
        "config-value", Place.CONFIG, "read of the field",
        "a field of the device-specific configuration reads as another value",
        "depends on the field: capacity is the size of the disk, …", "5",
        (
            Argument("field", text, None, "its name in the specification, such as capacity; has to be given"),
            Argument("value", integer, 0, "what it reads as"),
        ),
    ),
    Fault(
        "config-changes", Place.CONFIG, "read of the configuration",
        "a byte of the configuration reads as another value, and config_generation does not move",
        "config_generation changes when the configuration has", "4.1.4.3.1",
    ),
    Fault(
        "generation-moves", Place.CONFIG, "read of config_generation",
        "config_generation is another number at each read: the driver starts over and over",
        "config_generation changes when the configuration has", "4.1.4.3.1",
    ),
    Fault(
        "generation-stuck", Place.CONFIG, "read of config_generation",
        "config_generation stays what it was first, whatever changes",
        "config_generation changes when the configuration has", "4.1.4.3.1",
    ),
    Fault(
        "num-queues", Place.CONFIG, "read of num_queues", "num_queues reads as another number",
        "num_queues is the number of virtqueues", "4.1.4.3",
        (Argument("value", integer, 65535, "what it reads as"),), transport="PCI",
    ),
    Fault(
        "queue-size", Place.CONFIG, "read of queue_size", "queue_size reads as another number",
        "0, or a power of two unless RING_PACKED was negotiated", "4.1.4.3.1",
        (Argument("value", integer, 0, "what it reads as"),), of_queue=True, transport="PCI",
    ),
    Fault(
        "queue-notify-off", Place.CONFIG, "read of queue_notify_off",
        "queue_notify_off points outside of the notification structure",
        "the structure is long enough for every queue", "4.1.4.4.1",
        (Argument("value", integer, 65535, "what it reads as"),), of_queue=True, transport="PCI",
    ),
    Fault(
        "vector-refused", Place.CONFIG, "read of queue_msix_vector",
        "queue_msix_vector reads as NO_VECTOR: the device has no resources for it",
        "none: a driver has to do with less", "4.1.5.1.2.1", of_queue=True, transport="PCI",
    ),
)  # fmt: skip

_STATUS = (
    Fault(
        "features-flap", Place.STATUS, "read of device_feature",
        "some of the 32 feature bits read as their opposite",
        "the offered features do not change", "2.2.2",
        (Argument("mask", integer, None, "the bits; default: others each time"),),
    ),
    Fault(
        "features-extra", Place.STATUS, "read of the bit's word", "a feature bit is offered that nothing stands behind",
        "no bit is offered that nothing defines", "2.2.2",
        (Argument("bit", feature_bit, 44, "its number, 0 to 127"),),
    ),
    Fault(
        "features-missing", Place.STATUS, "read of the bit's word", "a feature bit is not offered",
        "VERSION_1 is offered", "6.2", (Argument("bit", feature_bit, 32, "its number, 0 to 127; 32 is VERSION_1"),),
    ),
    Fault(
        "features-refused", Place.STATUS, "FEATURES_OK of the driver", "FEATURES_OK does not stay set",
        "SHOULD accept any valid subset, and again after a reset", "2.2.2",
    ),
    Fault(
        "reset-stuck", Place.STATUS, "reset by device_status",
        "device_status keeps its old value: the reset does not come to its end",
        "device_status reads 0 when the reset is complete", "2.4.1",
        (Argument("time", seconds, None, "how long; default: for ever"),),
    ),
    Fault(
        "needs-reset", Place.STATUS, "notification of the driver",
        "the device sets NEEDS_RESET, and stops", "none: a driver has to reset the device", "2.1.2", of_queue=True,
    ),
)  # fmt: skip

_MADE = "making of the device"

_PCI = (
    Fault(
        "capability-loop", Place.PCI, _MADE, "the list of capabilities in config space goes round and round",
        "the list ends with a pointer of 0 (PCI 3.0)", "6.7 of PCI", transport="PCI",
    ),
    Fault(
        "capability-outside", Place.PCI, _MADE, "a structure of virtio is said to be outside of its BAR",
        "the structure is inside of the BAR", "4.1.4",
        (Argument("type", integer, 1, "cfg_type of the structure; 1 is the common configuration"),), transport="PCI",
    ),
    Fault(
        "capability-overlap", Place.PCI, _MADE, "a structure of virtio is said to be where the common configuration is",
        "each structure has its own place", "4.1.4",
        (Argument("type", integer, 2, "cfg_type of the structure; 2 are the notifications"),), transport="PCI",
    ),
    Fault(
        "capability-missing", Place.PCI, _MADE, "a structure of virtio has no capability",
        "there is at least one capability of each mandatory structure", "4.1.4",
        (Argument("type", integer, 1, "cfg_type of the structure; 1 is the common configuration"),), transport="PCI",
    ),
    Fault(
        "registers-all-ones", Place.PCI, "read of a register",
        "all registers read as ones, config space too, and writes are lost: surprise removal",
        "none: a driver has to cope with a device that is gone", "3.1.1",
        (Argument("time", seconds, None, "how long; default: for ever"),), transport="PCI",
    ),
)  # fmt: skip

_REQUEST, _READ, _WRITE = "read or write of the disk", "read of the disk", "write to the disk"

_DISKS = (
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

FAULTS = {fault.name: fault for fault in (*_RINGS, *_INTERRUPTS, *_CONFIGURATION, *_STATUS, *_PCI, *_DISKS)}
"""By name."""
