"""Declarations: faults of rings."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer, seconds

_USED, _SHOWN, _RING = "used buffer", "publication of used buffers", Place.RING

RINGS = (
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
        "len is the number of bytes that were written into the device-writable part", "2.7.8.2",
        (Argument("len", integer, None, "the length; default: one more than there is room for"),), of_queue=True,
    ),
    Fault(
        "used-len-short", _RING, _USED, "the used length is less than what the device has written",
        "len is the number of bytes that were written into the device-writable part", "2.7.8.2",
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
        "an element before used.idx belongs to the driver", "2.7.8",
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
        "the device writes the element before it updates idx", "2.7.8.2",
        (Argument("time", seconds, 0.1, "how much later the element comes"),), of_queue=True, ring="split",
    ),
    Fault(
        "used-idx-stuck", _RING, _SHOWN, "the element is written, and used.idx stays where it was until the next time",
        "the device writes the element and updates idx", "2.7.8.2", of_queue=True, ring="split",
    ),
    Fault(
        "used-after-reset", _RING, "reset of a queue in use",
        "a used element comes in the ring that was, when the driver may use its memory for something else already",
        "a device that was reset, or a queue, writes no used buffers", "2.6.1.1.1",
        (
            Argument("id", integer, 0xDEAD, "the id that is written"),
            Argument("len", integer, 0xFFFF_FFFF, "the length"),
            Argument("time", seconds, 0.1, "how much later than the reset"),
        ), of_queue=True,
    ),
    Fault(
        "desc-rewritten", _RING, _USED, "the device writes ones over the buffer's descriptor, which is the driver's",
        "the descriptor table is read by the device only", "2.7.5.1", of_queue=True, ring="split",
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
        "packed-event-reserved", _RING, "wish for a notification",
        "the device's event suppression structure has flags that are reserved, and a place outside of the ring",
        "flags are ENABLE, DISABLE or DESC", "2.8.10", of_queue=True, ring="packed",
    ),
    Fault(
        "event-far", _RING, "wish for a notification",
        "the device asks to be notified of a buffer far away: the driver does not notify (only with EVENT_IDX)",
        "the event is the next buffer that the device waits for", "2.7.10.2",
        (Argument("by", integer, None, "how far; default: half of all positions"),), of_queue=True,
    ),
    Fault(
        "notify-lost", _RING, "notification of the driver", "the device overlooks that it was notified",
        "a device looks at the queue that it is notified of", "2.7.13.4", of_queue=True,
    ),
    Fault(
        "notify-not-asked", _RING, "wish for a notification",
        "the device does not ask to be notified, and waits for a notification all the same",
        "a device that waits for buffers has asked for notifications", "2.7.10.2", of_queue=True,
    ),
)  # fmt: skip
