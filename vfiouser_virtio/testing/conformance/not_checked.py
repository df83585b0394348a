"""Rules of the checklist without a check, each with its reason."""

NOT_CHECKED: dict[str, str] = {
    "virtio14/SH1": "Shared memory never controls the device: what the device does because of a byte in a region that "
    "only it and one driver know the use of cannot be told from its other work.",
    "virtio14/LG1": "The trap for legacy drivers only concerns devices whose PCI id a legacy driver would bind to; a "
    "client sees the id, but not which drivers there were.",
}

IN_PART: dict[str, str] = {
    "virtio14/FB1": "Whether the device could honour a bit that is defined shows when the bit is used, not before.",
    "virtio14/RB3": "Whether DMA is translated or limited, so that ACCESS_PLATFORM should be offered, only the host "
    "knows.",
    "virtio14/CC4": "No client can make every device change its configuration: a change is only seen if one happens.",
    "virtio14/UN2": "used_event is not followed across 65535 → 0, which takes 65536 requests.",
    "virtio14/UR1": "The order of two stores is seen by polling: a device that swaps them is only found out when it "
    "is interrupted between them.",
    "virtio14/SD1": "That device-writable buffers are not read (SHOULD) leaves no trace.",
    "virtio14/PK5-desc": "Batches that pass the descriptor, and those that end before it, are not made on purpose.",
    "virtio14/SU2": "That a suspended device leaves its own configuration alone needs something that changes it.",
    "virtio14/VD1": "That reading vendor data has no side effect cannot be known without knowing the vendor's.",
    "virtio14/PC1": "Which of several structures of one kind is the best is the device's opinion.",
}
