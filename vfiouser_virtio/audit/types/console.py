"""Watch of a console's queues (virtio 1.4, 5.3.6)."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio.console import CONTROL, ConsoleFeature, Event
from vfiouser_virtio.virtio import DeviceCore

_OPERATION = "5.3.6.1 Device Operation"

RECEIVE = must(
    "console/receive-readable", _OPERATION, "No device-readable buffer is put into a receiveq.", "buffers of receiveqs"
)
TRANSMIT = must(
    "console/transmit-writable",
    _OPERATION,
    "No device-writable buffer is put into a transmitq.",
    "buffers of transmitqs",
)
READY = must(
    "console/device-ready",
    "5.3.6.2.2 Multiport Device Operation",
    "With MULTIPORT, a DEVICE_READY message is sent.",
    "another control message before it",
)

_CONTROL = codec(CONTROL.subcon)
_CONTROL_RECEIVEQ, _CONTROL_TRANSMITQ = 2, 3


class ConsoleWatch(RequestWatch):
    """Watch of ports and control messages."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._ready = False

    def reset(self) -> None:
        """A driver says anew that it is ready."""
        self._ready = False

    def available(self, chain: SeenChain) -> None:
        """Queues of even index are the device's to fill."""
        if chain.queue % 2 == 0:
            if chain.readable:
                self.broke(RECEIVE, f"queue {chain.queue}: a buffer with {chain.out_length:#x} readable bytes")
        elif chain.writable:
            self.broke(TRANSMIT, f"queue {chain.queue}: a buffer with {chain.in_length:#x} writable bytes")
        if chain.queue == _CONTROL_TRANSMITQ and self.accepted(ConsoleFeature.MULTIPORT):
            raw = chain.peek(_CONTROL.size)
            if len(raw) == _CONTROL.size:
                port, event, value = _CONTROL.unpack(raw)
                if event == Event.DEVICE_READY:
                    self._ready = True
                elif not self._ready:
                    self.broke(READY, f"sent event {event:#x} of port {port:#x}, value {value:#x}, before DEVICE_READY")
                    self._ready = True
