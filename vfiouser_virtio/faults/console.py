"""Faults of consoles: control messages that the device has not sent."""

from vfiouser_virtio.faults.declarations.console import CONSOLES
from vfiouser_virtio.faults.payload import Say, UsedBuffer, signed
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.protocols.virtio.console import CONTROL, RESIZE, Event

CONTROL_RECEIVEQ = 2
_MAX_MESSAGE = 1 << 16
_NAMES = tuple(fault.name for fault in CONSOLES)


class ConsolePayload:
    """Faults of the control receive queue; ``say`` sends a message."""

    def __init__(self, faults: FaultPlan, say: Say) -> None:
        self._faults, self._say = faults, say

    def spoil(self, buffer: UsedBuffer) -> None:
        """As `Payload.spoil`; the message itself stays as it is, and so is not looked at."""
        del buffer
        for name in _NAMES:
            if hit := self._faults.hit(name):
                self._say(control_message(hit))


def control_message(hit: Hit) -> bytes:
    """The message of a fault, which is logged."""
    name, port = hit.name, signed(hit["id"], 4)
    if name == "console-port-add":
        event, value, data = int(Event.PORT_ADD), 1, b""
    elif name == "console-port-remove":
        event, value, data = int(Event.PORT_REMOVE), 1, b""
    elif name == "console-message":
        event, value, data = hit["event"], hit["value"], b""
    elif name == "console-resize":
        event, value = int(Event.RESIZE), 0
        data = RESIZE.build({"cols": hit["cols"] & 0xFFFF, "rows": hit["rows"] & 0xFFFF})
    elif name == "console-name":
        event, value, data = int(Event.PORT_NAME), 1, hit["name"].encode()
    else:
        event, value, data = int(Event.PORT_OPEN), 1, b""
    message = port + signed(event, 2) + signed(value, 2) + data
    assert len(message) >= CONTROL.sizeof()
    if name in ("console-message-short", "console-message-long"):
        length = max(0, min(hit["len"], _MAX_MESSAGE))
        message = message[:length].ljust(length, b"\xff")
    shown = message[:32].hex() + ("…" if len(message) > 32 else "")
    hit.did(f"{len(message):#x} bytes: {shown}")
    return message
