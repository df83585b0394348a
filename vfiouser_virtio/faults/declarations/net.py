"""Declarations: faults of network devices."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer

_NET, _FRAME = Place.NET, "received frame"
_KICK = "notification of the driver"

NETWORKS = (
    Fault(
        "net-num-buffers", _NET, _FRAME, "the header says that the frame lies in another number of buffers",
        "num_buffers is the number of buffers that the frame lies in", "5.1.9.4.1",
        (Argument("value", integer, 0, "what it says; one more than there are is a lie as well"),),
        of_queue=True, devices="net",
    ),
    Fault(
        "net-gso", _NET, _FRAME, "the header says that the frame is a large one, to be cut into segments",
        "gso_type is what was negotiated, and what the frame is", "5.1.9.4.1",
        (
            Argument("type", integer, 1, "gso_type; 1 is TCP over IPv4"),
            Argument("size", integer, 0, "gso_size: bytes of a segment"),
            Argument("hdr-len", integer, 0, "hdr_len: bytes of the headers of each"),
        ), of_queue=True, devices="net",
    ),
    Fault(
        "net-csum", _NET, _FRAME, "the header says that a checksum is still to be made, outside of the frame",
        "with NEEDS_CSUM csum_start and csum_offset are in the frame", "5.1.9.4.1",
        (
            Argument("start", integer, 0xFFFF, "csum_start: from where on"),
            Argument("offset", integer, 0xFFFF, "csum_offset: where it is stored, from there on"),
        ), of_queue=True, devices="net",
    ),
    Fault(
        "net-flags", _NET, _FRAME, "the header has flags that were not negotiated, or mean nothing",
        "flags are those that were negotiated", "5.1.9.4.1",
        (Argument("value", integer, 0xFF, "all of them"),), of_queue=True, devices="net",
    ),
    Fault(
        "net-hash", _NET, _FRAME, "the header has another hash, of a kind that there is not (only with HASH_REPORT)",
        "hash_report is one of the kinds that the driver has asked for", "5.1.9.4.5",
        (
            Argument("value", integer, None, "hash_value; default: another one each time"),
            Argument("report", integer, 0xFFFF, "hash_report: the kind"),
        ), of_queue=True, devices="net",
    ),
    Fault(
        "net-frame-short", _NET, _FRAME, "the frame ends in its Ethernet header, or before it",
        "a frame has an Ethernet header", "5.1.9.4.1",
        (Argument("len", integer, 0, "its bytes; less than 0: the header of virtio ends early as well"),),
        of_queue=True, devices="net",
    ),
    Fault(
        "net-frame-long", _NET, _FRAME, "the frame goes on to the end of its buffer, with what was there before",
        "a frame is no longer than mtu and an Ethernet header", "5.1.4.1", of_queue=True, devices="net",
    ),
    Fault(
        "net-ack", _NET, "answer to a command", "the answer to a command is another one",
        "ack is OK for what was done, ERR for what was not", "5.1.9.5",
        (Argument("value", integer, 1, "what it is: 0 OK, 1 ERR; 255 looks as if there had been none"),),
        of_queue=True, devices="net",
    ),
    Fault(
        "net-link-flap", _NET, _KICK, "the link goes down, or up again the next time (only with STATUS)",
        "none: a driver has to follow", "5.1.4", of_queue=True, devices="net", by_itself=True,
    ),
    Fault(
        "net-announce", _NET, _KICK,
        "the device asks the driver to announce itself, without a reason (only with GUEST_ANNOUNCE)",
        "none: a driver has to answer each", "5.1.9.5.4", of_queue=True, devices="net", by_itself=True,
    ),
)  # fmt: skip
