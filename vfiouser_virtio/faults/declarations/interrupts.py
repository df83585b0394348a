"""Declarations: faults of interrupts."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer, seconds

_SHOWN = "publication of used buffers"
_INTERRUPT = "interrupt of a queue"

INTERRUPTS = (
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
        "SHOULD NOT notify when nothing was used", "2.7.7", of_queue=True, by_itself=True,
    ),
    Fault(
        "interrupt-early", Place.INTERRUPT, "enabling of a queue",
        "a used buffer notification is sent before DRIVER_OK",
        "no notifications before DRIVER_OK", "2.1.2", of_queue=True,
    ),
    Fault(
        "config-interrupt-spurious", Place.INTERRUPT, "notification of the driver",
        "a configuration change notification is sent while nothing has changed",
        "none: a driver has to compare", "2.3", of_queue=True, by_itself=True,
    ),
    Fault(
        "config-interrupt-lost", Place.INTERRUPT, "configuration change notification",
        "a configuration change is not notified", "a change is notified after DRIVER_OK", "2.3",
    ),
)  # fmt: skip
