"""Declarations: faults that only a device on PCI can have."""

from vfiouser_virtio.faults.declaration import MADE, Argument, Fault, Place, integer, seconds

_LATE = Argument("time", seconds, 0.1, "how much later")

PCI = (
    Fault(
        "capability-loop", Place.PCI, MADE, "the list of capabilities in config space goes round and round",
        "the list ends with a pointer of 0 (PCI 3.0)", "6.7 of PCI", transport="PCI",
    ),
    Fault(
        "capability-outside", Place.PCI, MADE, "a structure of virtio is said to be outside of its BAR",
        "the structure is inside of the BAR", "4.1.4",
        (Argument("type", integer, 1, "cfg_type of the structure; 1 is the common configuration"),), transport="PCI",
    ),
    Fault(
        "capability-overlap", Place.PCI, MADE, "a structure of virtio is said to be where the common configuration is",
        "each structure has its own place", "4.1.4",
        (Argument("type", integer, 2, "cfg_type of the structure; 2 are the notifications"),), transport="PCI",
    ),
    Fault(
        "capability-missing", Place.PCI, MADE, "a structure of virtio has no capability",
        "there is at least one capability of each mandatory structure", "4.1.4",
        (Argument("type", integer, 1, "cfg_type of the structure; 1 is the common configuration"),), transport="PCI",
    ),
    Fault(
        "isr-value", Place.PCI, "read of ISR status", "ISR status reads as something else, and is cleared",
        "bit 0: a queue has news, bit 1: the configuration has", "4.1.4.5",
        (Argument("value", integer, 0, "what it reads as"),), transport="PCI",
    ),
    Fault(
        "isr-stuck", Place.PCI, "read of ISR status", "reading ISR status does not clear it, and INTx stays asserted",
        "reading clears, and de-asserts INTx", "4.1.4.5.1", transport="PCI",
    ),
    Fault(
        "intx-stuck", Place.PCI, "read of ISR status", "ISR status is cleared, and INTx stays asserted",
        "reading clears, and de-asserts INTx", "4.1.4.5.1", transport="PCI",
    ),
    Fault(
        "intx-spurious", Place.PCI, "notification of the driver",
        "INTx is asserted, and ISR status is 0 (only without MSI-X)",
        "INTx is asserted while ISR status is not 0", "4.1.4.5.1", of_queue=True, transport="PCI", by_itself=True,
    ),
    Fault(
        "register-read-late", Place.PCI, "read of a register",
        "the read is done, and answered later; what comes behind it waits (QEMU gives up on a device after 5 s)",
        "none: but a processor waits for the answer", "4.1.3", (_LATE,), transport="PCI",
    ),
    Fault(
        "register-write-late", Place.PCI, "write of a register",
        "the write is done, and answered later, if at all; what comes behind it waits",
        "none: writes are posted, but the next read waits for them", "4.1.3", (_LATE,), transport="PCI",
    ),
    Fault(
        "registers-all-ones", Place.PCI, "read of a register",
        "all registers read as ones, config space too, and writes are lost: surprise removal",
        "none: a driver has to cope with a device that is gone", "3.1.1",
        (Argument("time", seconds, None, "how long; default: for ever"),), transport="PCI", by_itself=True,
    ),
)  # fmt: skip
