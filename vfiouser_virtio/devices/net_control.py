"""Control queue of a network device (virtio 1.4, 5.1.9.5): what the driver may set while the device runs.

::

    controlq ──▶ class, command ──▶ negotiated? length? ──▶ values checked ──▶ filter, steering, offloads, status
        ▲                                 │                       │
        └── ack, result ◀─────────────────┴─── ERR: nothing ──────┘
                                               has changed

A command has taken effect before its buffer is used. What no driver does is answered with ERR, and logged once.
"""

from vfiouser_virtio.devices.net_commands import COMMANDS, CommandRefused, ControlCommand, Settings
from vfiouser_virtio.protocols.virtio.net import CTRL_HDR_CODEC, Ack, NetFeature, Status
from vfiouser_virtio.virtio import Chain, GuestError, Queue

MAX_COMMAND = 256 << 10
"""Bytes of a command, enough for 40,000 addresses. A chain may name 4 GiB, all of which would be copied."""


class Control:
    """Commands of the driver, and what they have set."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def reset(self) -> None:
        """The driver has reset the device: nothing is filtered, nothing is steered, nothing to be announced."""
        settings = self.settings
        settings.command_num = settings.ok_num = 0
        settings.offloads = None
        settings.filter.reset()
        settings.steering.reset()
        settings.device.config.set(status=settings.status & ~Status.ANNOUNCE)

    def take_over(self, predecessor: "Control") -> None:
        """What the driver had told that one holds here."""
        settings, before = self.settings, predecessor.settings
        settings.filter.take_over(before.filter)
        settings.steering.take_over(before.steering)
        settings.command_num, settings.ok_num = before.command_num, before.ok_num
        settings.device.config.set(mac=before.device.config["mac"])
        # It may be on another network now, or at another place of the same.
        self.announce()
        settings.change_offloads(before.offloads)

    def announce(self) -> bool:
        """Ask the driver to make itself known on its network, by gratuitous packets (5.1.9.5.4).

        False where it has not negotiated GUEST_ANNOUNCE.
        """
        settings = self.settings
        if not settings.device.negotiated(NetFeature.GUEST_ANNOUNCE):
            return False
        settings.device.config.update(status=settings.status | Status.ANNOUNCE)
        return True

    async def serve(self, queue: Queue) -> None:
        """Answer commands until cancelled. Raises GuestError for one without room for the answer."""
        async for burst in queue.bursts(at_once=True):
            for chain in burst:
                self.answer(chain)

    def answer(self, chain: Chain) -> None:
        """Perform a command and complete its chain. Raises GuestError where there is no room for the answer."""
        readable, writable = chain.readable, chain.writable
        if not writable.length:
            raise GuestError("a command of the control queue has no writable byte for its ack")
        self.settings.command_num += 1
        if readable.length <= MAX_COMMAND:
            answer = self.perform(readable.read(), writable.length - 1)
        else:
            self._refuse(None, f"{readable.length:#x} bytes, of which {MAX_COMMAND:#x} at most are looked at")
            answer = bytes([Ack.ERR])
        writable.write(answer)
        chain.complete()

    def perform(self, request: bytes, room: int) -> bytes:
        """Perform a command: the bytes of the answer, of which the result has ``room`` for so many."""
        command, settings = None, self.settings
        try:
            if len(request) < CTRL_HDR_CODEC.size:
                raise CommandRefused(
                    f"{len(request):#x} bytes, of which class and command are {CTRL_HDR_CODEC.size:#x}"
                )
            command = COMMANDS.get(CTRL_HDR_CODEC.unpack_from(request))
            if command is None:
                raise CommandRefused(f"there is no command {request[1]:#x} of class {request[0]:#x}")
            if not settings.device.driver_features & command.features:
                raise CommandRefused("its feature was not negotiated")
            data = request[CTRL_HDR_CODEC.size :]
            if command.size is not None and len(data) != command.size:
                raise CommandRefused(f"its data have {len(data):#x} bytes instead of {command.size:#x}")
            if room < command.result:
                raise CommandRefused(f"there is room for {room:#x} bytes of its result, which has {command.result:#x}")
            result = command.perform(settings, data, room)
        except CommandRefused as refused:
            self._refuse(command, str(refused))
            return bytes([Ack.ERR])
        settings.ok_num += 1
        return bytes([Ack.OK]) + result

    def _refuse(self, command: ControlCommand | None, reason: str) -> None:
        name = "a command" if command is None else f"command {command.name}"
        self.settings.device.log.once(("control", name), "control queue: %s of the driver is refused: %s", name, reason)
