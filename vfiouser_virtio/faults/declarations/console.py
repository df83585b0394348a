"""Declarations: faults of consoles. All but one send a control message too many, which the device did not send."""

from vfiouser_virtio.faults.declaration import Argument, Fault, Place, integer, text

_CONSOLE, _MESSAGE = Place.CONSOLE, "control message of the device"
_PORT = Argument("id", integer, 0, "the number of the port")

CONSOLES = (
    Fault(
        "console-port-add", _CONSOLE, _MESSAGE, "one more PORT_ADD: for a port that exists, or cannot",
        "a port is added once, and its number is below max_nr_ports", "5.3.6.2.1", (_PORT,),
        devices="console", by_itself=True,
    ),
    Fault(
        "console-port-remove", _CONSOLE, _MESSAGE, "a PORT_REMOVE, while the device goes on using the port",
        "a port that was removed is not used", "5.3.6.2.1", (_PORT,), devices="console", by_itself=True,
    ),
    Fault(
        "console-message", _CONSOLE, _MESSAGE, "a control message that no driver knows, or of a port that there is not",
        "event is one of those that are defined, id a port that was added", "5.3.6.2",
        (
            _PORT,
            Argument("event", integer, 0xFFFF, "what it is; 6 is PORT_OPEN"),
            Argument("value", integer, 1, "its value"),
        ), devices="console", by_itself=True,
    ),
    Fault(
        "console-message-short", _CONSOLE, _MESSAGE, "a PORT_OPEN that ends early",
        "a control message has 8 bytes", "5.3.6.2",
        (_PORT, Argument("len", integer, 3, "its bytes"),), devices="console", by_itself=True,
    ),
    Fault(
        "console-message-long", _CONSOLE, _MESSAGE, "a PORT_OPEN with more behind it, up to the end of the buffer",
        "a control message ends where it should", "5.3.6.2",
        (_PORT, Argument("len", integer, 4096, "its bytes"),), devices="console", by_itself=True,
    ),
    Fault(
        "console-resize", _CONSOLE, _MESSAGE, "a RESIZE to a size that no terminal has",
        "none: cols and rows may be any", "5.3.6.2",
        (_PORT, Argument("cols", integer, 0, "its width"), Argument("rows", integer, 0xFFFF, "its height")),
        devices="console", by_itself=True,
    ),
    Fault(
        "console-name", _CONSOLE, _MESSAGE, "a PORT_NAME with slashes, or what else is no name",
        "the name is UTF-8, and good for a symbolic link", "5.3.6.2",
        (_PORT, Argument("name", text, "../../../dev/null", "the name; a NUL is not added")),
        devices="console", by_itself=True,
    ),
)  # fmt: skip
