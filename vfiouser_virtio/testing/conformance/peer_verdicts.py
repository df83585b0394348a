"""Known failures of SPDK's virtio-blk target in `conform`, each with the sentence of a specification."""

SPDK = "SPDK at commit 3230130e6a (August 2026, with DPDK 26.03), `vfu_virtio_create_blk_endpoint … --packed-ring`"
SPDK_SUMMARY = "80 pass, 9 fail, 8 advice, 98 not applicable"

SPDK_NEWER = (
    *(f"virtio14/NU{number}" for number in range(1, 8)),
    *(f"virtio14/NP{number}" for number in range(1, 10)),
    "virtio14/NP5-hdr-len",
)
"""Checks of network devices alone that there were not when SPDK's disks were seen."""

SPDK_SCSI_SUMMARY = "54 pass, 5 fail, 6 advice, 130 not applicable"

SPDK_FAILURES: dict[str, tuple[str, str]] = {
    "vfio-user/dma-messages": (
        "a buffer in memory without a file descriptor is never used",
        (
            'vfio-user, Read and Write Operations: "all of these operations must be supported by the client and/or '
            'server"; Introduction: "There is always an in-band, message-passing fall back mechanism."'
        ),
    ),
    "virtio14/PI1-msix": (
        "the pending bits are in BAR2, an I/O BAR",
        (
            '4.1.1: a device MUST meet "the specification requirements of the appropriate PCI specification"; '
            "by PCI 3.0, 6.8.2, PBA BIR names the BAR that maps the pending bits into memory space"
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
    "virtio14/CC8-split": (
        "queue_size 3 is taken",
        (
            '4.1.4.3.1: "If VIRTIO_F_RING_PACKED has not been negotiated, the device MUST present either a value of 0 '
            'or a power of 2"; by 4.1.4.3.2 no driver may write a 3'
        ),
    ),
    "virtio14/MF1": (
        "the status byte must have a descriptor of its own",
        '2.7.4.1: "The device MUST NOT make assumptions about the particular arrangement of descriptors."',
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
"""What was seen, and the rule, by the id of the check."""

SPDK_ADVICE: dict[str, str] = {
    "virtio14/PI3": "revision 0, subsystem id 0, where 4.1.2.1 has two SHOULDs",
    "virtio14/ST2-sets": "a descriptor index beyond the queue does not lead to NEEDS_RESET",
    "virtio14/RB1-accept": "FEATURES_OK stays without VERSION_1",
    "virtio14/CC8-reset": "a queue_size that the driver wrote survives the reset",
    "virtio14/MF1-packed": "on a packed ring, too, the status byte must have a descriptor of its own",
    "vfio-user/dma-map-argsz": "as libvfio-user, on which it stands",
    "vfio-user/dma-map-short-file": "as libvfio-user",
    "qemu/dma-unmap-nothing": "as libvfio-user",
}
"""What was seen that no sentence with a MUST forbids, by the id of the check."""


def peer_table() -> list[str]:
    """The part of the document about SPDK, as lines."""
    rows = [f"| `{check_id}` | {seen} | {text} |" for check_id, (seen, text) in SPDK_FAILURES.items()]
    return [
        "## SPDK's verdicts",
        "",
        f"{SPDK}: {SPDK_SUMMARY}.",
        f"The {len(SPDK_NEWER)} checks of tunnels, for network devices alone, are newer than that.",
        "Section numbers are those of virtio 1.4. What is in quotation marks is the specification's own text (for",
        "vfio-user, QEMU's docs/interop/vfio-user.rst).",
        "",
        "| check | what was seen | what says that it is wrong |",
        "|---|---|---|",
        *rows,
        "",
        "The notes of advice, for which no specification has a MUST:",
        "",
        *(f"- `{check_id}`: {seen}" for check_id, seen in SPDK_ADVICE.items()),
        "",
        "Its virtio-scsi target (`vfu_virtio_create_scsi_endpoint … --packed-ring`), whose requests are not exercised:",
        f"{SPDK_SCSI_SUMMARY}. All of them are in the lists above.",
        "",
    ]
