"""What `conform` says of SPDK's virtio-blk target, with the sentence of a specification for each failure, if any."""

SPDK = "SPDK at commit 3230130e6a (August 2026, with DPDK 26.03), `vfu_virtio_create_blk_endpoint … --packed-ring`"
SPDK_SUMMARY = "79 pass, 15 fail, 3 advice, 22 not applicable"

SPDK_FAILURES: dict[str, tuple[str, str]] = {
    "vfio-user/dma-messages": (
        "a buffer in memory without a file descriptor is never used",
        (
            'vfio-user, Read and Write Operations: "all of these operations must be supported by the client and/or '
            'server"; Introduction: "There is always an in-band, message-passing fall back mechanism."'
        ),
    ),
    "vfio-user/twin-socket": (
        "the same, although a twin socket was agreed on",
        (
            "as above; VFIO_USER_DMA_READ only adds that the message is then "
            '"passed over the separate server-to-client socket"'
        ),
    ),
    "virtio14/PI1-msix": (
        "the pending bits are in BAR2, an I/O BAR",
        (
            '4.1.1: a device MUST meet "the specification requirements of the appropriate PCI specification"; '
            "by PCI 3.0, 6.8.2, PBA BIR names the BAR that maps the pending bits into memory space"
        ),
    ),
    "virtio14/PI3": (
        "revision 0, subsystem id 0",
        (
            '4.1.2.1: "Non-transitional devices SHOULD have a PCI Revision ID of 1 or higher", '
            'and "SHOULD have a PCI Subsystem Device ID of 0x40 or higher"'
        ),
    ),
    "virtio14/PA1": (
        "no PCI_CFG capability",
        '4.1.4.9.1: "The device MUST present at least one VIRTIO_PCI_CAP_PCI_CFG capability."',
    ),
    "virtio14/CC8": (
        "a queue_select beyond the last queue is ignored, and the fields stay those of the queue before",
        (
            '4.1.4.3.1: "The device MUST present a 0 in queue_size if the virtqueue corresponding to the current '
            'queue_select is unavailable."'
        ),
    ),
    "virtio14/CC8-reset": (
        "a queue_size that the driver wrote survives the reset",
        (
            '4.1.4.3, in the description of queue_size, without a MUST: "On reset, specifies the maximum queue size '
            'supported by the device."'
        ),
    ),
    "virtio14/CC8-split": (
        "queue_size 3 is taken",
        (
            '4.1.4.3.1: "If VIRTIO_F_RING_PACKED has not been negotiated, the device MUST present either a value of 0 '
            'or a power of 2"; by 4.1.4.3.2 no driver may write a 3'
        ),
    ),
    "virtio14/ST2": (
        "a descriptor index beyond the queue does not lead to NEEDS_RESET",
        (
            "no sentence found, advice: by 2.1.2 the device SHOULD set DEVICE_NEEDS_RESET "
            '"when it enters an error state that a reset is needed", and nothing says that such an index is one'
        ),
    ),
    "virtio14/RB1-accept": (
        "FEATURES_OK stays without VERSION_1",
        'no sentence found, advice: 6.2: "A device MAY fail to operate further if VIRTIO_F_VERSION_1 is not accepted."',
    ),
    "virtio14/MF1": (
        "the status byte must have a descriptor of its own",
        '2.7.4.1: "The device MUST NOT make assumptions about the particular arrangement of descriptors."',
    ),
    "virtio14/PK4": (
        "the same on a packed ring",
        (
            "2.7.4.1, as above: it stands in the section about split virtqueues, but 7.3 demands it of every device; "
            "2.8.18, about the order of descriptors in a list, does not say it"
        ),
    ),
    "virtio14/SI2": (
        "a chain whose last descriptor refers to an indirect table is not carried out",
        (
            '2.7.5.3.2: "The device MUST handle the case of zero or more normal chained descriptors followed by a '
            'single descriptor with flags&VIRTQ_DESC_F_INDIRECT."'
        ),
    ),
    "virtio14/IS3": (
        "Interrupt Status in PCI status stays 0",
        (
            '4.1.4.5.1: "If MSI-X capability is disabled, the device MUST set the Interrupt Status bit in the PCI '
            'Status register", to the logical OR of all bits in ISR status'
        ),
    ),
    "virtio14/MX2": (
        "a vector beyond the table is taken, and all are 0 after a reset",
        (
            '4.1.5.1.2.1: "Devices MUST report mapping failures by returning the NO_VECTOR value", and "MUST have all '
            'queue and configuration change events are unmapped upon reset"; by 4.1.5.1.2.2 no driver may write that'
        ),
    ),
}
"""What was seen, and the rule (or that there is none), by the id of the check."""


def peer_table() -> list[str]:
    """The part of the document about SPDK, as lines."""
    rows = [f"| `{check_id}` | {seen} | {text} |" for check_id, (seen, text) in SPDK_FAILURES.items()]
    return [
        "## SPDK's verdicts",
        "",
        f"{SPDK}: {SPDK_SUMMARY}.",
        "Section numbers are those of virtio 1.4. What is in quotation marks is the specification's own text (for",
        "vfio-user, QEMU's docs/interop/vfio-user.rst). For two failures no sentence was found: they are advice.",
        "",
        "| check | what was seen | what says that it is wrong |",
        "|---|---|---|",
        *rows,
        "",
        "The three notes of advice are `vfio-user/dma-map-argsz`, `vfio-user/dma-map-short-file` and",
        "`qemu/dma-unmap-nothing`: libvfio-user, on which SPDK stands, does so.",
        "",
    ]
