"""Declarations: faults of status and features."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, feature_bit, integer, seconds

STATUS = (
    Fault(
        "features-flap", Place.STATUS, "read of device_feature",
        "some of the 32 feature bits read as their opposite",
        "the offered features do not change", "2.2.2",
        (Argument("mask", integer, None, "the bits; default: others each time"),),
    ),
    Fault(
        "features-extra", Place.STATUS, "read of the bit's word", "a feature bit is offered that nothing stands behind",
        "no bit is offered that nothing defines", "2.2.2",
        (Argument("bit", feature_bit, 44, "its number, 0 to 127"),),
    ),
    Fault(
        "features-missing", Place.STATUS, "read of the bit's word", "a feature bit is not offered",
        "VERSION_1 is offered", "6.2", (Argument("bit", feature_bit, 32, "its number, 0 to 127; 32 is VERSION_1"),),
    ),
    Fault(
        "features-refused", Place.STATUS, "FEATURES_OK of the driver", "FEATURES_OK does not stay set",
        "SHOULD accept any valid subset, and again after a reset", "2.2.2",
    ),
    Fault(
        "reset-stuck", Place.STATUS, "reset by device_status",
        "device_status keeps its old value: the reset does not come to its end",
        "device_status reads 0 when the reset is complete", "2.4.1",
        (Argument("time", seconds, None, "how long; default: for ever"),),
    ),
    Fault(
        "suspend-stuck", Place.STATUS, "SUSPEND of the driver",
        "the device stops, and does not say so: DRIVER_OK stays, SUSPEND does not come (only with SUSPEND)",
        "a request to suspend ends in success or in NEEDS_RESET", "3.4.2",
        (Argument("time", seconds, None, "how long; default: for ever"),),
    ),
    Fault(
        "suspend-refused", Place.STATUS, "SUSPEND of the driver",
        "the device sets NEEDS_RESET instead of SUSPEND (only with SUSPEND)",
        "none: a driver has to reset the device", "3.4.2",
    ),
    Fault(
        "needs-reset", Place.STATUS, "notification of the driver",
        "the device sets NEEDS_RESET, and stops", "none: a driver has to reset the device", "2.1.2", of_queue=True,
        by_itself=True,
    ),
)  # fmt: skip
