"""Driver MUSTs of virtio 1.4 that the audit does not look at, and why."""

from typing import NamedTuple


class Unseen(NamedTuple):
    """MUSTs of one section."""

    section: str
    why: str
    rules: tuple[str, ...]


_MIND = "what a driver relies on, or assumes, does not show"
_INSIDE = "happens within the guest"
_TIME = "would need a time after which something is late"
_NOT_HERE = "our devices do not have this"

UNSEEN: list[Unseen] = [
    Unseen(
        "2.2.1 Feature Bits",
        _INSIDE,
        (
            "The offered bits are validated.",
            "Without a feature that it needs, and no fall-back, a driver sets FAILED and ceases.",
            "A driver does not fail only because a feature is offered that it does not know.",
        ),
    ),
    Unseen(
        "2.5.1 Device Configuration Space",
        _MIND,
        (
            "Reads of fields wider than 32 bits, or of several fields, are not assumed to be atomic.",
            "The sizes of structures and of the configuration space are not limited.",
        ),
    ),
    Unseen(
        "2.7.7.1 Used Buffer Notification Suppression",
        _MIND,
        ("Spurious notifications are handled.",),
    ),
    Unseen(
        "2.7.8.2 The Virtqueue Used Ring", _MIND, ("Nothing is assumed of data behind the first len bytes written.",)
    ),
    Unseen(
        "2.7.10.1 Available Buffer Notification Suppression",
        f"{_TIME}: whatever comes before a notification may be another vCPU's",
        (
            "Where flags are 0, a notification is sent after a buffer was made available.",
            "Where idx was avail_event, a notification is sent.",
        ),
    ),
    Unseen(
        "2.7.10.1 Available Buffer Notification Suppression",
        _MIND,
        (
            "Without EVENT_IDX, avail_event is ignored.",
            "With EVENT_IDX, bit 0 of flags is ignored.",
        ),
    ),
    Unseen(
        "2.7.13.3.1 Updating idx, 2.7.13.4.1 Notifying The Device, 2.8.21.1.1 Updating flags",
        "a missing barrier shows only now and then, as a descriptor that is not written yet",
        (
            "There is a memory barrier before idx is updated.",
            "There is a memory barrier before flags or avail_event are read.",
            "There is a memory barrier before the flags of a packed descriptor are updated.",
        ),
    ),
    Unseen(
        "2.8.17 Scatter-Gather Support",
        _MIND,
        ("The device is not relied upon to use more descriptors, so that a list can be written out.",),
    ),
    Unseen(
        "2.12, 2.13 Device groups, Administration virtqueues; 4.1.4.3.2",
        _NOT_HERE,
        (
            "LIST_USE comes before any other command, and while none is under way.",
            "No command is used that was not reported and listed.",
            "Reserved status and status_qualifier values are handled as EINVAL and INVALID_COMMAND.",
            "The parts of a command are multiples of 64 bits.",
            "What the device has not written of a result counts as zero.",
            "Commands on several administration virtqueues are ordered by the driver.",
            "Administration virtqueues have the indices that the device says.",
        ),
    ),
    Unseen(
        "3.1.1 Device Initialization", _INSIDE, ("Initialization ends where one of its steps goes wrong for good.",)
    ),
    Unseen(
        "4.1.2.2 PCI Device Discovery",
        _INSIDE,
        (
            "Devices are matched by vendor 0x1af4 and 0x1040 plus the device id.",
            "Types with a transitional id are matched by that as well.",
            "Any PCI revision is matched.",
        ),
    ),
    Unseen(
        "4.1.4.1 Virtio Structure PCI Capabilities",
        _INSIDE,
        (
            "Capabilities with a reserved cfg_type are ignored.",
            "Those with a reserved bar are ignored.",
            "A larger cap_len is accepted.",
            "An unexpectedly large length is handled.",
        ),
    ),
    Unseen("4.1.4.8.2 Vendor data capability", _NOT_HERE, ("vendor_id is qualified before the rest is interpreted.",)),
    Unseen("4.1.5.1.2.2 MSI-X Vector Configuration", _INSIDE, ("Any MSI-X Table Size is supported.",)),
    Unseen(
        "4.1.5.4.2 Notification of Device Configuration Changes",
        _INSIDE,
        ("One interrupt may mean used buffers and a change of the configuration.",),
    ),
    Unseen(
        "6.1 Reserved Feature Bits",
        _INSIDE,
        (
            "With ACCESS_PLATFORM, the IOMMU is set up for the device, or disabled.",
            "Without it, addresses are physical ones.",
            "With ORDER_PLATFORM, barriers are those for hardware.",
        ),
    ),
    Unseen(
        "5.1.4.2 Device configuration layout",
        _MIND,
        (
            "With MAC, the address of the interface is mac.",
            "With MTU, there are receive buffers for a packet of that size.",
            "Values of speed and duplex that are not defined are taken as unknown.",
        ),
    ),
    Unseen(
        "5.1.9.4.2 Processing of Incoming Packets",
        _MIND,
        (
            "Flags that a driver does not know are ignored.",
            "Without NEEDS_CSUM, or with RSC_INFO, csum_start and csum_offset are not used.",
            "hdr_len is not relied upon.",
            "Without NEEDS_CSUM and DATA_VALID, the checksum is not relied upon.",
            "Packets with both bits of UDP tunnels, or with one and no NEEDS_CSUM, are not accepted.",
            "Packets with UDP_TUNNEL_CSUM and no bit of UDP tunnels are not accepted.",
            "outer_th_offset and inner_nh_offset are not used without such a bit.",
            "outer_nh_offset is not used without OUT_NET_HEADER.",
        ),
    ),
    Unseen(
        "5.1.9.4.4.5 Inner Header Hash, 5.1.9.5.8.4 RSS Context, 5.1.9.6.5 Flow filter, 5.1.9.7.5 IPsec Operation",
        _NOT_HERE,
        (
            "HASH_TUNNEL_SET is sent only where HASH_TUNNEL was negotiated, with supported types.",
            "RSS contexts are used only where RSS_CONTEXT was negotiated, with ids that there are.",
            "Flow filters: capabilities, groups, classifiers and rules.",
            "IPsec: capabilities, security associations and path MTU.",
        ),
    ),
    Unseen("5.1.9.5.4.1 Gratuitous Packet Sending", _TIME, ("ANNOUNCE_ACK follows the bit ANNOUNCE of status.",)),
    Unseen(
        "5.1.9.5.10.5 Notifications Coalescing",
        _MIND,
        ("What VQ_GET returns with an error is ignored.",),
    ),
    Unseen(
        "5.2.5.1, 5.2.6.1 Block Device",
        _NOT_HERE,
        ("Zoned devices: models, zone addresses, appends, write pointers (12 rules).",),
    ),
    Unseen(
        "5.2.6.1 Device Operation",
        _MIND,
        (
            "After writeback was set to 0, earlier writes are not taken to be committed.",
            "Nothing is assumed of what discarded sectors read as.",
            "Nothing is assumed of the segments of a request that failed.",
        ),
    ),
    Unseen("5.3.6.2.2 Multiport Device Operation", _TIME, ("PORT_OPEN with value 1 follows a CONSOLE_PORT message.",)),
    Unseen("5.4.6.1 Device Operation", _INSIDE, ("The length that was written is examined.",)),
    Unseen(
        "5.5.3.1, 5.5.6.1, 5.5.6.6.1, 5.5.6.7.1 Memory Balloon Device",
        _INSIDE,
        (
            "Pages that are to keep a value are reported only with PAGE_POISON.",
            "Pages are used again only after deflation, and with MUST_TELL_HOST after its acknowledgement.",
            "Pages are not used between inflation and its acknowledgement.",
            "Without DEFLATE_ON_OOM, pages are not used while num_pages says so.",
            "deflateq is used for pages that the driver wants back.",
            "Hinted and reported pages are taken as uninitialized, and initialized when they are used again.",
            "Reported pages are not used before the acknowledgement, and have poison_val.",
        ),
    ),
    Unseen(
        "5.5.6.1, 5.5.6.3.1, 5.5.6.5.1 Memory Balloon Device",
        _TIME,
        (
            "actual is updated after the number of pages has changed.",
            "statsq has a buffer after initialization, and again when the device has used it.",
            "Hinting ends with STOP where no pages can be supplied.",
        ),
    ),
    Unseen(
        "5.5.6.3.1 Memory Statistics",
        "the specification says 6 bytes, its structure has 10, and so has every driver: an erratum",
        ("Buffers of statsq are multiples of 6 bytes.",),
    ),
    Unseen("6.1 Reserved Feature Bits", _NOT_HERE, ("SR_IOV is negotiated before virtual functions are enabled.",)),
]
