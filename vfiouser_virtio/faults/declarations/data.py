"""Declarations: faults of what is in the buffers, whatever the device."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer

_USED, _DATA = "used buffer", Place.DATA

DATA = (
    Fault(
        "data-zeros", _DATA, _USED, "what the device has written reads as zeros",
        "depends on the device: one of entropy gives random bytes, …", "5", of_queue=True,
    ),
    Fault(
        "data-random", _DATA, _USED, "what the device has written reads as random bytes",
        "depends on the device: a console gives what was typed, …", "5",
        (
            Argument("from", integer, 0, "the first byte of the buffer that does"),
            Argument("bytes", integer, None, "how many; default: all that the device has written"),
        ), of_queue=True,
    ),
    Fault(
        "readable-overwritten", _DATA, _USED,
        "the device writes ones over a buffer that it may only read (up to 64 KiB of it)",
        "the device does not write to a device-readable buffer", "2.7.5.1", of_queue=True,
    ),
)  # fmt: skip
