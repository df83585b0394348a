"""Declarations: faults of input devices."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer

_INPUT, _EVENT = Place.INPUT, "event of the device"

INPUTS = (
    Fault(
        "input-event", _INPUT, _EVENT, "one more event: of a type or code that the device does not have",
        "events are of the types and codes that EV_BITS has", "5.8.6",
        (
            Argument("type", integer, 0x1E, "its type; 1 is a key"),
            Argument("code", integer, 0x2FF, "its code"),
            Argument("value", integer, 1, "its value"),
        ), devices="input", by_itself=True,
    ),
    Fault(
        "input-no-syn", _INPUT, "SYN_REPORT of the device",
        "the end of what belongs together is not said: the event before comes twice instead",
        "SYN_REPORT ends what belongs together", "5.8.6.2", devices="input",
    ),
    Fault(
        "input-absinfo", _INPUT, "read of the range of an axis", "an axis has a range that is none",
        "min is not more than max", "5.8.4",
        (
            Argument("min", integer, 1000, "where it begins, signed"),
            Argument("max", integer, 0, "where it ends, signed"),
        ), devices="input",
    ),
)  # fmt: skip
