"""Input device (virtio 1.4, 5.8): a keyboard, mouse, tablet or touch screen, played by a program or a recording.

::

    await keyboard.press("leftctrl", "c")      await mouse.move(10, -4)       await screen.touch(0, 100, 200)
    await keyboard.write("ls -l\\n")            await mouse.click("right")     await screen.lift(0)

    keys, movements ──▶ frames (ended by SYN_REPORT) ──▶ eventq ──▶ /dev/input/eventN of the guest
    leds, on_status ◀── statusq ◀── its lights and sounds
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.devices.input_face import CHARACTERS, SLOTS, Event, Kind, face_of
from vfiouser_virtio.devices.input_recording import recorded
from vfiouser_virtio.protocols.virtio import input as wire
from vfiouser_virtio.protocols.virtio.input import Abs, Btn, Ev, Led, Rel, Select, Syn
from vfiouser_virtio.virtio import ConfigError, Device, queue, register
from vfiouser_virtio.virtio.options import Duration

MAX_FRAMES = 256
"""Frames that wait for buffers of the guest: one that takes none must not fill our memory."""
MAX_STATUS = 64
"""Events of one buffer of the statusq; Linux puts one into each."""

_END: Event = (Ev.SYN, Syn.REPORT, 0)


@register
class Input(Device):
    """Input device of a kind. Its methods send events: they wait while the guest takes none, without one do nothing.

    Raises ConfigError for texts that are too long and for a file that is no recording, DeviceError for one that cannot
    be read.
    """

    device_id = wire.DEVICE_ID
    made_in_thread = True
    driver_writes = frozenset({"select", "subsel"})
    eventq = queue(max_size=64)
    statusq = queue(max_size=64)

    def __init__(
        self,
        *,
        kind: Annotated[Kind, "what it is"] = "keyboard",
        name: Annotated[str | None, "what the guest calls it, up to 128 bytes; default: after its kind"] = None,
        serial: Annotated[str, "serial number, up to 128 bytes"] = "",
        replay: Annotated[
            Path | None, "recorded events to send: what was read from /dev/input/eventN of a 64-bit Linux"
        ] = None,
        replay_delay: Annotated[
            Duration, "wait so long after the driver's start, until a program has the device open"
        ] = 0.0,
        replay_timing: Annotated[bool, "send them at their pace; off: as fast as the guest takes them"] = True,
    ) -> None:
        super().__init__(config=wire.Config())
        self.kind: Kind = kind
        self.replay_delay, self.replay_timing = replay_delay, replay_timing
        self.dropped = 0
        """Events that were not sent, because no driver was there, or it took none."""
        self.leds: frozenset[Led] = frozenset()
        """Lights that are on."""
        self.on_status: Callable[[int, int, int], None] = lambda _type, _code, _value: None
        """Called with type, code and value of what the guest says: lights (EV_LED), sounds (EV_SND)."""
        self._face = face_of(kind)
        self._recording = [] if replay is None else list(recorded(replay))
        for _, events in self._recording:
            self._face.extend(events)
        texts = {Select.ID_NAME: f"vfiouser-virtio {kind}" if name is None else name, Select.ID_SERIAL: serial}
        self._texts = {select: text.encode() for select, text in texts.items()}
        if any(len(text) > wire.MAX_DATA for text in self._texts.values()):
            raise ConfigError(f"input: name and serial have up to {wire.MAX_DATA} bytes each")
        self._product = ("keyboard", "mouse", "tablet", "multitouch").index(kind) + 1
        self._frames: deque[tuple[Event, ...]] = deque()
        self.running = False
        """Whether a driver is there, and the device at work: otherwise what is sent goes nowhere."""
        self._changed = trio.lowlevel.ParkingLot()
        self.fingers: set[int] = set()
        """Those that are on the screen."""
        self.last_touch = 0
        """MT_TRACKING_ID of the last finger that was put on it."""

    # ---- for programs: a keyboard ----------------------------------------------------------------------------------

    async def wait_running(self) -> None:
        """Wait until a driver is there: what is sent before goes nowhere."""
        while not self.running:
            await self._changed.park()

    async def press(self, *keys: str | int) -> None:
        """Press keys or buttons one after the other, and let go of them: ``press("leftctrl", "c")``.

        Names are those of linux/input-event-codes.h in lower case, without KEY_ or BTN_. Raises ValueError for what the
        device does not have.
        """
        await self.key_down(*keys)
        await self.key_up(*reversed(keys))

    async def key_down(self, *keys: str | int) -> None:
        """Press keys or buttons. Errors as `press`."""
        for code in [self._face.key(key) for key in keys]:
            await self.send((Ev.KEY, code, 1))

    async def key_up(self, *keys: str | int) -> None:
        """Let go of them. Errors as `press`."""
        for code in [self._face.key(key) for key in keys]:
            await self.send((Ev.KEY, code, 0))

    async def write(self, text: str) -> None:
        """Type a text on a keyboard with US layout. Raises ValueError for other characters before anything is typed."""
        if strange := sorted(set(text) - CHARACTERS.keys()):
            raise ValueError(f"no key of a US keyboard types {strange[0]!r}")
        for character in text:
            await self.press(*CHARACTERS[character])

    async def wait_led(self, led: Led, *, on: bool = True) -> None:
        """Wait until the guest has turned a light on, or off."""
        while (led in self.leds) is not on:
            await self._changed.park()

    # ---- for programs: pointers ------------------------------------------------------------------------------------

    async def click(self, button: str = "left") -> None:
        """Press a button and let go of it: ``left``, ``right``, ``middle``, ``side``, ``extra``."""
        await self.press(button)

    async def move(self, dx: int, dy: int) -> None:
        """Move a mouse by so much."""
        await self.send(*((Ev.REL, axis, by) for axis, by in ((Rel.X, dx), (Rel.Y, dy)) if by))

    async def scroll(self, lines: int, *, columns: int = 0) -> None:
        """Turn the wheel of a mouse or tablet: up and to the right are positive."""
        await self.send(*((Ev.REL, axis, by) for axis, by in ((Rel.WHEEL, lines), (Rel.HWHEEL, columns)) if by))

    async def move_to(self, x: int, y: int) -> None:
        """Point a tablet to a place, 0 to `input_face.TABLET_MAX` each."""
        await self.send((Ev.ABS, Abs.X, x), (Ev.ABS, Abs.Y, y))

    async def touch(self, finger: int, x: int, y: int) -> None:
        """Put a finger, 0 to 9, on a multitouch screen, or move it there. Places as `move_to`."""
        if not 0 <= finger < SLOTS:
            raise ValueError(f"finger {finger} is not 0 to {SLOTS - 1}")
        await self._room()
        new = finger not in self.fingers
        number = self.last_touch + 1 & 0xFFFF
        events: list[Event] = [(Ev.ABS, Abs.MT_SLOT, finger)]
        if new:
            events.append((Ev.ABS, Abs.MT_TRACKING_ID, number))
        events += [(Ev.ABS, Abs.MT_POSITION_X, x), (Ev.ABS, Abs.MT_POSITION_Y, y)]
        if not self.fingers:
            events.append((Ev.KEY, Btn.TOUCH, 1))
        if min(self.fingers, default=finger) >= finger:  # what programs see that know of one finger only
            events += [(Ev.ABS, Abs.X, x), (Ev.ABS, Abs.Y, y)]
        self._face.check(events)
        if new and self.running:
            self.fingers.add(finger)
            self.last_touch = number
        self._put(events)

    async def lift(self, finger: int) -> None:
        """Take a finger off the screen; nothing if it is not on it."""
        await self._room()
        if finger in self.fingers:
            self.fingers.remove(finger)
            events = [(Ev.ABS, Abs.MT_SLOT, finger), (Ev.ABS, Abs.MT_TRACKING_ID, -1)]
            self._put(events if self.fingers else [*events, (Ev.KEY, Btn.TOUCH, 0)])

    # ---- for programs: anything ------------------------------------------------------------------------------------

    async def send(self, *events: Event) -> None:
        """Send events as one frame, to which SYN_REPORT is added; waits while `MAX_FRAMES` wait for the guest.

        Without a driver they are dropped, and counted. Raises ValueError for what the device does not have, for a value
        that is not in the range of its axis or does not fit into 32 bits, and for more events than
        `input_face.MAX_FRAME`.
        """
        self._face.check(events)
        await self._room()
        self._put(events)

    def send_nowait(self, *events: Event) -> bool:
        """As `send`; where it would wait, the whole frame is dropped and counted, and the result is False (5.8.6.2)."""
        self._face.check(events)
        if len(self._frames) >= MAX_FRAMES:
            self.dropped += len(events)
            return False
        return self._put(events)

    async def _room(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.running and len(self._frames) >= MAX_FRAMES:
            await self._changed.park()

    def _put(self, events: Sequence[Event]) -> bool:
        if not self.running:
            self.dropped += len(events)
            return False
        if events:
            self._frames.append((*events, _END))
            self._changed.unpark_all()
        return True

    # ---- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self.running = True
        self._changed.unpark_all()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_frames)
                nursery.start_soon(self._take_status)
                if self._recording:
                    nursery.start_soon(self._replay)
        finally:
            self._stop()

    def take_over(self, predecessor: Device) -> None:
        super().take_over(predecessor)
        self._show()
        if isinstance(predecessor, Input):
            self.leds, self.running = predecessor.leds, predecessor.running
            self.fingers, self.last_touch = set(predecessor.fingers), predecessor.last_touch

    def _stop(self) -> None:
        """Nothing is sent until the next run."""
        self.running = False
        self.dropped += sum(len(frame) - 1 for frame in self._frames)
        self._frames.clear()
        self._changed.unpark_all()

    def reset(self) -> None:
        self._stop()
        self.fingers.clear()
        self.leds = frozenset()
        self.config.set(select=Select.UNSET, subsel=0)
        self._show()
        self.log.forget()

    async def _send_frames(self) -> None:
        """Each event has a buffer of its own. A frame that was begun is sent to its end, however long that takes."""
        while True:
            while not self._frames:
                await self._changed.park()
            frame = self._frames.popleft()
            self._changed.unpark_all()
            for event in frame:
                chain = await anext(self.eventq)
                while chain.writable.length < wire.EVENT_CODEC.size:
                    self.log.once(
                        "room", "ignored: a buffer of %#x bytes for an event (5.8.6.1)", chain.writable.length
                    )
                    chain.complete(0)
                    chain = await anext(self.eventq)
                chain.writable.write(wire.EVENT_CODEC.pack(*event))
                chain.complete()

    async def _take_status(self) -> None:
        async for burst in self.statusq.bursts(at_once=True):
            for chain in burst:
                size = wire.EVENT_CODEC.size
                count = chain.readable.length // size
                if not count or count > MAX_STATUS:
                    self.log.once("status", "ignored: of a buffer with %d status events all but %d", count, MAX_STATUS)
                events = list(wire.EVENT_CODEC.iter_unpack(chain.readable.read(min(count, MAX_STATUS) * size)))
                chain.complete(0)
                for kind, code, value in events:
                    if kind == Ev.LED and code in {*Led}:
                        self.leds = self.leds | {Led(code)} if value else self.leds - {Led(code)}
                    self.on_status(kind, code, value)
            self._changed.unpark_all()

    async def _replay(self) -> None:
        await trio.sleep(self.replay_delay)
        start, first = trio.current_time(), self._recording[0][0]
        for at, events in self._recording:
            if self.replay_timing:
                await trio.sleep_until(start + max(at - first, 0))
            await self.send(*events)
        self.log.info("%d recorded frames were sent", len(self._recording))

    # ---- configuration ---------------------------------------------------------------------------------------------

    def config_written(self, field: str, value: int | bytes) -> None:
        assert field in self.driver_writes, (field, value)
        self._show()

    def _show(self) -> None:
        select, subsel = self.config["select"], self.config["subsel"]
        assert isinstance(select, int)
        assert isinstance(subsel, int)
        self.config.set(**self._answer(select, subsel))

    def _answer(self, select: int, subsel: int) -> dict[str, int | bytes]:
        """``size`` and ``data`` for what the driver has selected; ``size`` 0 for what there is not (5.8.5.2)."""
        data = b""
        if select in self._texts and not subsel:
            data = self._texts[Select(select)]
        elif select == Select.ID_DEVIDS and not subsel:
            data = wire.DEVIDS_CODEC.pack(wire.BUS_VIRTUAL, 0x1AF4, self._product, 1)
        else:
            data = self._face.bits(select, subsel)
        return {"size": len(data), "data": data.ljust(wire.MAX_DATA, b"\0")}
