"""Console device (virtio 1.4, 5.3): one to many ports, each a console or a plain channel, each with a chardev.

::

    guest                             queues          Console                     host
    /dev/hvc0           (console)     0 rx, 1 tx ──── ports[0] ────────────────── chardev[0]  pty, unix:…, stdio
                                      2 rx, 3 tx ──── control messages
    /dev/virtio-ports/NAME (plain)    4 rx, 5 tx ──── ports[1] ────────────────── chardev[1]
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import trio

from vfiouser_virtio.backends.changes import tell_changes
from vfiouser_virtio.backends.chardev import Chardev, FdChardev
from vfiouser_virtio.backends.chardev_spec import SPECS, open_chardev
from vfiouser_virtio.backends.log_file import LIMIT
from vfiouser_virtio.devices.console_ports import Port
from vfiouser_virtio.host_access import HostAccess, confine_all
from vfiouser_virtio.protocols.virtio import console as wire
from vfiouser_virtio.protocols.virtio.console import ConsoleFeature, Event
from vfiouser_virtio.virtio import ConfigError, Device, GuestError, register
from vfiouser_virtio.virtio.options import Size

# As many as QEMU's virtio-serial has; each takes two queues.
MAX_PORTS = 31
# Longer ones are no file names, and the guest has one there.
MAX_NAME = 255
# Where no terminal says otherwise: what everybody assumes of a terminal that does not say.
DEFAULT_SIZE = 80, 24


@register
class Console(Device):
    """Console device: ports 0 to n-1, one per ``chardev``. More than one, or one that is no console, takes MULTIPORT.

    A program can also give chardevs that it has made, as those of `backends.pair`. They are closed with the device.
    Raises ConfigError for options that contradict each other, DeviceError where a host side cannot be had.
    """

    device_id = wire.DEVICE_ID
    made_in_thread = True
    feature_bits = ConsoleFeature
    driver_writes = frozenset({"emerg_wr"})

    def __init__(
        self,
        *,
        chardev: Annotated[
            Sequence[str | Chardev] | None, f"host side of the next port: {SPECS}; default: one pty"
        ] = None,
        name: Annotated[
            Sequence[str] | None, "name of the next port in /dev/virtio-ports of the guest; may be empty"
        ] = None,
        console: Annotated[
            Sequence[str] | None, "number of a port that is a console; default: all without a name"
        ] = None,
        cols: Annotated[int | None, "width of the consoles; default: that of the terminal on stdio, else 80"] = None,
        file_limit: Annotated[
            Size | None, "to how many bytes a file:PATH grows; what comes then is lost; default: 256M"
        ] = None,
        rows: Annotated[int | None, "height of the consoles; default: that of the terminal on stdio, else 24"] = None,
    ) -> None:
        # A pty, because a guest may use its console without a reader: it never waits, and the last 64 KiB are kept.
        specs = ["pty"] if chardev is None else chardev
        count = len(specs)
        names = _names(name or [], count)
        consoles = _consoles(console or [], names)
        for option, value in (("cols", cols), ("rows", rows)):
            if value is not None and not 0 < value <= 0xFFFF:
                raise ConfigError(f"console: {option}={value} is not 1 to 65535")
        self.multiport = count > 1 or bool(names[0]) or not consoles
        features = (
            ConsoleFeature.SIZE.mask | ConsoleFeature.EMERG_WRITE.mask | self.multiport * ConsoleFeature.MULTIPORT.mask
        )
        super().__init__(config=wire.Config(max_nr_ports=count), features=features)

        queues = [self.add_queue() for _ in range(2 * count + 2 * self.multiport)]
        self._control_receiveq, self._control_transmitq = queues[2:4] if self.multiport else queues[:2]
        if self.multiport:
            del queues[2:4]
        self.ports: list[Port] = []
        for number, host in enumerate(_open_all(specs, LIMIT if file_limit is None else file_limit)):
            size = host.size or DEFAULT_SIZE
            port = Port(
                number,
                host,
                queues[2 * number],
                queues[2 * number + 1],
                name=names[number],
                is_console=number in consoles,
                size=(cols or size[0], rows or size[1]),
            )
            host.on_connect = port.host_changed
            host.on_resize = partial(self.resize, port=number)
            if isinstance(host, FdChardev):
                host.log = self.log
            self.ports.append(port)
        self._set_size(self.ports[0].size)
        # Control messages the driver has not taken yet, by port and event: a newer one takes the place of an older one,
        # so that neither side can fill our memory.
        self._outbox: dict[tuple[int, Event], bytes] = {}
        self._posted = trio.lowlevel.ParkingLot()

    def describe(self) -> str:
        """Where the ports are on the host: ``pty /dev/pts/3, org.example: unix:/run/x.sock``."""
        return ", ".join(f"{port.name and f'{port.name}: '}{port.chardev.describe()}" for port in self.ports)

    def resize(self, cols: int, rows: int, port: int = 0) -> None:
        """Another size for a port that is a console. Raises ValueError for what is not 0 to 65535."""
        if not (0 <= cols <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"{cols}×{rows} is no terminal size")
        resized = self.ports[port]
        resized.size = cols, rows
        if port == 0:
            self._set_size(resized.size, self.config.update)
        if resized.ready and resized.is_console:
            self._post_size(resized)

    # ---- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        with_control = self.negotiated(ConsoleFeature.MULTIPORT)
        async with trio.open_nursery() as nursery:
            # All of them, so that people can connect to ports that the guest does not use (yet).
            for port in self.ports:
                nursery.start_soon(port.chardev.run)
            for port in self.ports if with_control else self.ports[:1]:
                nursery.start_soon(port.receive)
                nursery.start_soon(port.transmit)
                if with_control and not port.is_console:
                    nursery.start_soon(tell_changes, port.wait_host, partial(self._tell_open, port))
            if with_control:
                nursery.start_soon(self._send_control)
                nursery.start_soon(self._receive_control)
            else:
                self.ports[0].guest_open = True

    def config_written(self, field: str, value: int | bytes) -> None:
        """Emergency write (5.3.5): the lower byte, at any time, even before the driver has said a word."""
        assert isinstance(value, int), field
        self.ports[0].chardev.send_nowait(bytes([value & 0xFF]))

    def take_over(self, predecessor: Device) -> None:
        super().take_over(predecessor)
        if isinstance(predecessor, Console):
            for port, before in zip(self.ports, predecessor.ports, strict=True):
                port.take_over(before)

    def reset(self) -> None:
        for port in self.ports:
            port.reset()
        self._outbox.clear()
        self.log.forget()

    def confine(self) -> HostAccess:
        return confine_all(port.chardev for port in self.ports)

    def close(self) -> None:
        for port in self.ports:
            port.chardev.close()

    # ---- control messages: to the driver ---------------------------------------------------------------------------

    async def _send_control(self) -> None:
        while True:
            while not self._outbox:
                await self._posted.park()
            chain = await anext(self._control_receiveq)
            if not self._outbox:  # a reset came first
                continue
            message = self._outbox.pop(next(iter(self._outbox)))
            if (room := chain.writable.length) < len(message):
                raise GuestError(f"a buffer of {room:#x} bytes for a control message of {len(message):#x} (5.3.6.2)")
            chain.writable.write(message)
            chain.complete()

    def _post(self, port: Port, event: Event, value: int = 1, data: bytes = b"") -> None:
        self._outbox[port.number, event] = wire.CONTROL_CODEC.pack(port.number, event, value) + data
        self._posted.unpark_all()

    def _post_size(self, port: Port) -> None:
        cols, rows = port.size
        self._post(port, Event.RESIZE, 0, wire.RESIZE_CODEC.pack(cols, rows))

    def _tell_open(self, port: Port) -> bool:
        """Tell the driver whether somebody is at the other end, where it does not know; whether that was so."""
        if not port.ready or port.told_open is port.host_open:
            return False
        port.told_open = port.host_open
        self._post(port, Event.PORT_OPEN, int(port.host_open))
        return True

    def _set_size(self, size: tuple[int, int], tell: Callable[..., None] | None = None) -> None:
        (tell or self.config.set)(cols=size[0], rows=size[1])

    # ---- control messages: from the driver -------------------------------------------------------------------------

    async def _receive_control(self) -> None:
        async for chain in self._control_transmitq:
            message = chain.parse(wire.CONTROL)
            chain.complete()
            if message.event == Event.DEVICE_READY:
                self._device_ready(bool(message.value))
            elif message.id >= len(self.ports):
                self._complain(
                    "port", f"control message {message.event:#x} for port {message.id:#x} of {len(self.ports):#x}"
                )
            elif message.event == Event.PORT_READY:
                self._port_ready(self.ports[message.id], bool(message.value))
            elif message.event == Event.PORT_OPEN:
                self.ports[message.id].guest_open = bool(message.value)
            else:
                self._complain("event", f"control message {message.event:#x}, which no driver sends")

    def _device_ready(self, success: bool) -> None:
        if not success:
            self._complain("device", "the driver says that it cannot use the device")
            return
        for port in self.ports:
            if not port.added:  # no port may be added twice (5.3.6.2.1)
                port.added = True
                self._post(port, Event.PORT_ADD)

    def _port_ready(self, port: Port, success: bool) -> None:
        """The driver can use a port. It need not have been added since the reset, as with QEMU's own device.

        After suspend-to-RAM and hibernation Linux goes on with the ports of before: virtcons_restore() says PORT_READY
        for each of them (and PORT_OPEN, if it is open) and no DEVICE_READY. To the driver such a port exists, so no
        PORT_ADD follows for it (5.3.6.2.1), even if a DEVICE_READY comes later, as Windows's driver sends it.
        """
        port.ready = success
        if not success:
            self._complain(f"port {port.number}", f"the driver says that it cannot use port {port.number}")
            return
        port.added = True
        if port.is_console:
            self._post(port, Event.CONSOLE_PORT)
            self._post_size(port)
        if port.name:
            self._post(port, Event.PORT_NAME, data=port.name.encode())
        port.told_open = None
        self._tell_open(port)

    def _complain(self, kind: str, what: str) -> None:
        """Once per reset and kind: a guest must not fill our log."""
        self.log.once(kind, "ignored: %s", what)


def _names(given: Sequence[str], ports: int) -> list[str]:
    if not 0 < ports <= MAX_PORTS:
        raise ConfigError(f"console: {ports} ports; there can be 1 to {MAX_PORTS}")
    if len(given) > ports:
        raise ConfigError(f"console: {len(given)} names for {ports} ports: one chardev= for each is needed")
    for name in given:
        if "/" in name or not name.isprintable() or len(name.encode()) > MAX_NAME:
            raise ConfigError(f"console: {name!r} cannot be a file name in the guest's /dev/virtio-ports")
    taken = [name for name in given if name]
    if len(set(taken)) < len(taken):
        raise ConfigError(f"console: two ports have the same name: {', '.join(taken)}")
    return [*given, *[""] * (ports - len(given))]


def _consoles(given: Sequence[str], names: list[str]) -> set[int]:
    """Which ports are consoles. By default it is the name that makes a port a channel for programs."""
    if not given:
        return {number for number, name in enumerate(names) if not name}
    for number in given:
        if not number.isdecimal() or int(number) >= len(names):
            raise ConfigError(f"console: console={number} is not the number of a port, 0 to {len(names) - 1}")
    return {int(number) for number in given}


def _open_all(specs: Sequence[str | Chardev], file_limit: int) -> list[Chardev]:
    opened: list[Chardev] = []
    try:
        for spec in specs:
            # One by one, so that what was opened is known.
            opened.append(open_chardev(spec, file_limit=file_limit) if isinstance(spec, str) else spec)  # noqa: PERF401
    except Exception:
        for chardev in opened:
            chardev.close()
        raise
    return opened


def example() -> Console:
    """One whose port goes nowhere, for tests."""
    return Console(chardev=["null"])
