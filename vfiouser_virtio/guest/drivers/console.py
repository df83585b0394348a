"""Driver for the console device (virtio 1.4, 5.3): ports with their data and their control messages.

::

    receiveq0   transmitq0           port 0, always there
    control_receiveq …_transmitq     with MULTIPORT: PORT_ADD, PORT_NAME, PORT_OPEN, RESIZE, …
    receiveq1   transmitq1   …       with MULTIPORT: the other ports, set up at once, used when PORT_ADD has come
"""

import logging
from collections import deque
from collections.abc import Callable

import trio

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.guest.virtqueue import DriverVirtqueue
from vfiouser_virtio.guest.virtqueues import new_vq
from vfiouser_virtio.protocols.virtio import console as wire
from vfiouser_virtio.protocols.virtio.console import ConsoleFeature, Event

logger = logging.getLogger(__name__)

RECEIVE_BUFFERS, RECEIVE_SIZE = 8, 4096
"""Of each port: input that is not taken stays with the device beyond these."""

MAX_PORTS = 64
"""Ports that are set up, however many a device says it has."""

KEPT_MESSAGES = 256

_CONTROL, _RESIZE = wire.CONTROL_CODEC, wire.RESIZE_CODEC
# The longest control message is a PORT_NAME.
_CONTROL_ROOM = _CONTROL.size + 1024


class Inbox:
    """Queue of buffers that the device fills; each goes back to it when it has been taken."""

    def __init__(self, device: VirtioDevice, count: int, size: int) -> None:
        self.device = device
        self.filled: deque[tuple[DmaBuffer, int]] = deque()
        self.arrived = trio.lowlevel.ParkingLot()
        self.on_arrival: Callable[[], None] = lambda: None
        self._count, self._size = count, size
        self._vq: DriverVirtqueue | None = None

    async def open(self, field: str) -> None:
        """Set the queue up and offer all the buffers; the device sees them with the first `kick`."""
        vq = self._vq = await new_vq(self.device, field, self._used)
        for _ in range(min(self._count, vq.size)):
            self._offer(self.device.memory.alloc(self._size))

    def kick(self) -> None:
        """Show the device what was offered."""
        assert self._vq is not None
        self._vq.kick()

    def take(self) -> bytes | None:
        """The oldest message; None: there is none."""
        if not self.filled:
            return None
        buffer, written = self.filled.popleft()
        data = bytes(buffer.view[:written])
        self._offer(buffer)
        self.kick()
        return data

    def close(self) -> None:
        """The device has been reset: give all the memory back."""
        assert self._vq is not None
        for buffer in [*self._vq.shutdown(), *(buffer for buffer, _ in self.filled)]:
            self.device.memory.free(buffer)
        self.filled.clear()

    def _offer(self, buffer: DmaBuffer) -> None:
        assert self._vq is not None
        self._vq.add_buf([(buffer.address, self._size)], 0, 1, buffer)

    def _used(self, vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            self.filled.append(used)
        self.on_arrival()
        self.arrived.unpark_all()
        return True


class ConsolePort:
    """Console port. What the device has said of it is in the attributes; `wait_for` waits for that to change."""

    def __init__(self, console: "ConsolePorts", number: int, inbox: Inbox, outbox: RequestQueue) -> None:
        self.console = console
        self.number = number
        self.name = ""
        self.added = False
        """PORT_ADD has come, or there is no MULTIPORT."""
        self.is_console = False
        self.host_open = False
        """Whether a host is at the other end, as far as the device tells."""
        self.size: tuple[int, int] | None = None
        """Columns and rows, once a RESIZE has come."""
        self._inbox = inbox
        self._outbox = outbox
        self._rest = b""

    async def send(self, data: bytes) -> None:
        """Returns when the device has taken all of it."""
        for at in range(0, len(data), RECEIVE_SIZE):
            await self._outbox.request([data[at : at + RECEIVE_SIZE]])

    async def receive(self, limit: int | None = None) -> bytes:
        """Input, at least one byte and at most ``limit``; waits until there is some."""
        while not self._rest:
            data = self._inbox.take()
            if data is None:
                await self.console.device.wait(self._inbox.arrived)
            else:
                self._rest = data
        taken = self._rest[:limit]
        self._rest = self._rest[len(taken) :]
        return taken

    async def open(self) -> None:
        """Tell the device that input is taken here. Only with MULTIPORT; without, it always assumes so."""
        await self.console.control(self.number, Event.PORT_OPEN, 1)

    async def close(self) -> None:
        """Tell the device that input is no longer taken."""
        await self.console.control(self.number, Event.PORT_OPEN, 0)

    async def wait_for(self, condition: Callable[["ConsolePort"], bool]) -> None:
        """Wait until what the device says of this port is so."""
        while not condition(self):
            await self.console.device.wait(self.console.changed)


class ConsolePorts:
    """Ports of a console device: ``driver_data`` of it."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.ports: dict[int, ConsolePort] = {}
        """By number; those that the device has not added yet, too."""
        self.changed = trio.lowlevel.ParkingLot()
        self.messages: deque[tuple[int, int, int, bytes]] = deque(maxlen=KEPT_MESSAGES)
        """The last control messages that came: port, event, value, and what followed."""
        self._inboxes: list[Inbox] = []
        self._outboxes: list[RequestQueue] = []
        self._control_in: Inbox | None = None
        self._control_out: RequestQueue | None = None

    async def wait_port(self, number: int) -> ConsolePort:
        """The port, when the device has added it."""
        while number not in self.ports or not self.ports[number].added:
            await self.device.wait(self.changed)
        return self.ports[number]

    async def size(self) -> tuple[int, int]:
        """Columns and rows of port 0 in the configuration. Needs SIZE."""
        values = await self.device.config.get_all("cols", "rows")
        cols, rows = values["cols"], values["rows"]
        assert isinstance(cols, int)
        assert isinstance(rows, int)
        return cols, rows

    async def emergency_write(self, byte: int) -> None:
        """Output without any queue (5.3.5). Needs EMERG_WRITE."""
        await self.device.config.set("emerg_wr", byte)

    async def control(self, port: int, event: int, value: int, data: bytes = b"") -> None:
        """Send a control message. Returns when the device has taken it. Needs MULTIPORT."""
        assert self._control_out is not None, "control messages need MULTIPORT"
        await self._control_out.request([_CONTROL.pack(port, event, value) + data])

    # ---- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Set up all queues, make the device ready, and with MULTIPORT tell it so."""
        device = self.device
        multiport = device.has_feature(ConsoleFeature.MULTIPORT)
        self.ports[0] = await self._open_port(0)
        if multiport:
            self._control_in = await self._open_inbox("control_receiveq", _CONTROL_ROOM)
            self._control_in.on_arrival = self._control_arrived
            self._control_out = await self._open_outbox("control_transmitq")
            for number in range(1, await self._count_ports()):
                self.ports[number] = await self._open_port(number)
        else:
            port = self.ports[0]
            port.added = port.is_console = port.host_open = True
        await device.ready()
        for inbox in self._inboxes:
            inbox.kick()
        if multiport:
            self._post(0, Event.DEVICE_READY)

    def stop(self) -> None:
        """The device has been reset: take back all that it had."""
        for inbox in self._inboxes:
            inbox.close()
        for outbox in self._outboxes:
            outbox.close()

    async def _count_ports(self) -> int:
        ports = await self.device.config.get_int("max_nr_ports")
        if ports > MAX_PORTS:
            logger.warning("%s has %d ports; the first %d are used", self.device.name, ports, MAX_PORTS)
        return min(ports, MAX_PORTS)

    async def _open_port(self, number: int) -> ConsolePort:
        inbox = await self._open_inbox(f"receiveq{number}", RECEIVE_SIZE)
        return ConsolePort(self, number, inbox, await self._open_outbox(f"transmitq{number}"))

    async def _open_inbox(self, field: str, size: int) -> Inbox:
        inbox = Inbox(self.device, RECEIVE_BUFFERS, size)
        await inbox.open(field)
        self._inboxes.append(inbox)
        return inbox

    async def _open_outbox(self, field: str) -> RequestQueue:
        outbox = await RequestQueue.open(self.device, field)
        self._outboxes.append(outbox)
        return outbox

    # ---- control messages ----------------------------------------------------------------------------------------

    def _post(self, port: int, event: Event, value: int = 1) -> None:
        assert self._control_out is not None
        self._control_out.post([_CONTROL.pack(port, event, value)])

    def _control_arrived(self) -> None:
        assert self._control_in is not None
        while (message := self._control_in.take()) is not None:
            if len(message) < _CONTROL.size:
                logger.warning("%s: a control message of %d bytes", self.device.name, len(message))
                continue
            number, event, value = _CONTROL.unpack_from(message)
            rest = message[_CONTROL.size :]
            self.messages.append((number, event, value, rest))
            port = self.ports.get(number)
            if port is None:
                logger.warning(
                    "%s: control message %d for port %d, which it does not have", self.device.name, event, number
                )
            else:
                self._tell(port, event, value, rest)
        self.changed.unpark_all()

    def _tell(self, port: ConsolePort, event: int, value: int, rest: bytes) -> None:
        """What the device says of a port (5.3.6.2)."""
        match event:
            case Event.PORT_ADD if not port.added:  # a second one is forbidden, and would make us answer without end
                port.added = True
                self._post(port.number, Event.PORT_READY)
            case Event.PORT_REMOVE:
                port.added = False
            case Event.CONSOLE_PORT:
                port.is_console = bool(value)
            case Event.PORT_OPEN:
                port.host_open = bool(value)
            case Event.PORT_NAME:
                port.name = rest.rstrip(b"\0").decode(errors="replace")
            case Event.RESIZE if len(rest) >= _RESIZE.size:
                port.size = _RESIZE.unpack_from(rest)[0], _RESIZE.unpack_from(rest)[1]


class ConsoleDriver(VirtioDriver):
    """Driver that makes a `ConsolePorts` of each device."""

    name = "virtio_console"
    id_table = virtio_ids(wire.DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(
            ConsoleFeature.SIZE.mask | ConsoleFeature.MULTIPORT.mask | ConsoleFeature.EMERG_WRITE.mask
        )
        console = device.driver_data = ConsolePorts(device)
        await console.start()

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.stop()


DRIVER = ConsoleDriver
