"""What `conform` says of SPDK's virtio-blk target, with the sentence of a specification that justifies each failure."""

SPDK = "SPDK at commit 3230130e6a (August 2026, with DPDK 26.03), `vfu_virtio_create_blk_endpoint … --packed-ring`"
SPDK_SUMMARY = "79 pass, 15 fail, 3 advice, 22 not applicable"

SPDK_FAILURES: dict[str, tuple[str, str]] = {
    "vfio-user/dma-messages": (
        "a buffer in memory without a file descriptor is never used",
        "vfio-user, VFIO_USER_DMA_MAP: memory that comes without a descriptor is accessed with DMA_READ and DMA_WRITE",
    ),
    "vfio-user/twin-socket": (
        "the same, although a twin socket was agreed on",
        "vfio-user, VFIO_USER_VERSION: with a twin socket, the server's requests use that",
    ),
    "virtio14/PI1-msix": (
        "the pending bits are in BAR2, an I/O BAR",
        "PCI 3.0, 6.8.2.5: PBA BIR names the BAR that maps the pending bits into memory space",
    ),
    "virtio14/PI3": (
        "revision 0, subsystem id 0",
        "4.1.2.1: non-transitional devices SHOULD have revision 1 or higher, and a subsystem id of 0x40 or higher",
    ),
    "virtio14/PA1": (
        "no PCI_CFG capability",
        "4.1.4.9.1: the device MUST present at least one PCI_CFG capability",
    ),
    "virtio14/CC8": (
        "any queue_select beyond the last queue shows queue 0",
        "4.1.4.3.1: the device MUST present 0 in queue_size if the selected queue is unavailable",
    ),
    "virtio14/CC8-reset": (
        "a queue_size that the driver wrote survives the reset",
        "4.1.4.3: queue_size specifies, on reset, the maximum queue size that the device supports",
    ),
    "virtio14/CC8-split": (
        "queue_size 3 is taken",
        "4.1.4.3.1: without RING_PACKED the device MUST present 0 or a power of 2 in queue_size",
    ),
    "virtio14/ST2": (
        "a descriptor index beyond the queue is passed over in silence, and the queue hangs",
        "2.1.2: the device SHOULD set DEVICE_NEEDS_RESET when it enters an error state that needs a reset",
    ),
    "virtio14/RB1-accept": (
        "FEATURES_OK stays without VERSION_1",
        "2.2.2: for no valid subset the device MUST fail to set FEATURES_OK; 6.1: a driver MUST accept VERSION_1",
    ),
    "virtio14/MF1": (
        "the status byte must have a descriptor of its own",
        "2.6.4.1: the device MUST NOT make assumptions about the particular arrangement of descriptors",
    ),
    "virtio14/PK4": ("the same on a packed ring", "2.6.4.1, as above"),
    "virtio14/SI2": (
        "a chain whose last descriptor refers to an indirect table is not carried out",
        "2.7.5.3.2: the device MUST handle normal descriptors that are followed by one with INDIRECT",
    ),
    "virtio14/IS3": (
        "Interrupt Status in PCI status stays 0",
        "4.1.4.5.1: without MSI-X the device MUST set that bit to the logical OR of all bits of ISR status",
    ),
    "virtio14/MX2": (
        "a vector beyond the table is taken, and all are 0 after a reset",
        "4.1.5.1.2.1: the device MUST return NO_VECTOR for an event that is unmapped",
    ),
}
"""What was seen, and the rule in short, by the id of the check."""


def peer_table() -> list[str]:
    """The part of the document about SPDK, as lines."""
    rows = [f"| `{check_id}` | {seen} | {text} |" for check_id, (seen, text) in SPDK_FAILURES.items()]
    return [
        "## SPDK's verdicts",
        "",
        f"{SPDK}: {SPDK_SUMMARY}. Section numbers are those of virtio 1.4, the rules are given in short.",
        "",
        "| check | what was seen | what says that it is wrong |",
        "|---|---|---|",
        *rows,
        "",
        "The three notes of advice are `vfio-user/dma-map-argsz`, `vfio-user/dma-map-short-file` and",
        "`qemu/dma-unmap-nothing`: libvfio-user, on which SPDK stands, does so.",
        "",
    ]
