"""Declarations: faults of the configuration, and of the registers of queues."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer, register, seconds, text

CONFIGURATION = (
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
        "config-all-ones", Place.CONFIG, "read of the configuration", "what is read of the configuration are ones",
        "depends on the field", "2.5",
    ),
    Fault(
        "config-write-lost", Place.CONFIG, "write to the configuration", "what the driver writes is lost",
        "the device keeps what the driver may write", "2.5",
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
        "register-write-lost", Place.CONFIG, "write of the register",
        "what the driver writes to a register of the common configuration is lost",
        "registers keep what was written", "4.1.4.3",
        (Argument("register", register, "any", "its name, such as queue_enable, or any"),), transport="PCI",
    ),
    Fault(
        "queue-reset-stuck", Place.CONFIG, "reset of a queue by queue_reset",
        "queue_reset stays 1: the reset does not come to its end (only with RING_RESET)",
        "queue_reset reads 0 when the reset is complete", "4.1.4.3.1",
        (Argument("time", seconds, None, "how long; default: for ever"),), of_queue=True, transport="PCI",
    ),
    Fault(
        "vector-refused", Place.CONFIG, "read of queue_msix_vector",
        "queue_msix_vector reads as NO_VECTOR: the device has no resources for it",
        "none: a driver has to do with less", "4.1.5.1.2.1", of_queue=True, transport="PCI",
    ),
)  # fmt: skip
