"""Face of an input device: the events that a keyboard, mouse, tablet or touch screen has (virtio 1.4, 5.8.5.2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vfiouser_virtio.protocols.virtio import input as wire
from vfiouser_virtio.protocols.virtio.input import Abs, Btn, Ev, Led, Prop, Rel, Rep, Select, Snd

MAX_FRAME = 64
"""Events of one frame; ten fingers take 50."""
TABLET_MAX = 0x7FFF
"""The largest coordinate of a tablet and of a multitouch screen."""
SLOTS = 10
"""Fingers of a multitouch screen."""

Kind = Literal["keyboard", "mouse", "tablet", "multitouch"]
Event = tuple[int, int, int]
"""Type, code and value of evdev."""

_BUTTONS = (Btn.LEFT, Btn.RIGHT, Btn.MIDDLE, Btn.SIDE, Btn.EXTRA)
_COORDINATE = (0, TABLET_MAX)
_ANY = (-(1 << 31), (1 << 31) - 1)


@dataclass(slots=True)
class InputFace:
    """Events that a device can send and take, by its configuration."""

    kind: Kind
    codes: dict[int, set[int]]
    """By event type."""
    axes: dict[int, tuple[int, int]]
    """Range of each."""
    properties: tuple[Prop, ...] = ()

    def key(self, key: str | int) -> int:
        """The code of a key or button, by code or name. Raises ValueError for what the device does not have."""
        code = key
        if isinstance(key, str):
            code = wire.KEYS.get(key, -1)
            # The arrow keys "left" and "right" have the names of buttons: a device has either.
            if code not in self.codes.get(Ev.KEY, ()) and key.upper() in Btn.__members__:
                code = Btn[key.upper()]
        if code not in self.codes.get(Ev.KEY, ()):
            raise ValueError(f"a {self.kind} has no key or button {key!r}")
        return int(code)

    def check(self, events: Sequence[Event]) -> None:
        """Raises ValueError for events that the device cannot send as one frame."""
        if len(events) > MAX_FRAME:
            raise ValueError(f"{len(events)} events in one frame; there may be {MAX_FRAME}")
        for kind, code, value in events:
            if code not in self.codes.get(kind, ()) or kind in (Ev.LED, Ev.SND, Ev.REP):
                raise ValueError(f"a {self.kind} sends no event of type {kind:#x}, code {code:#x}")
            low, high = self.axes.get(code, _ANY) if kind == Ev.ABS else _ANY
            if not low <= value <= high and not (value == -1 and code == Abs.MT_TRACKING_ID):
                raise ValueError(f"event of type {kind:#x}, code {code:#x}: {value} is not {low} to {high}")

    def extend(self, events: Iterable[Event]) -> None:
        """What is recorded can be sent, whatever the kind has otherwise."""
        for kind, code, value in events:
            self.codes.setdefault(kind, set()).add(code)
            if kind == Ev.ABS and value != -1:
                low, high = self.axes.get(code, (0, 0))
                self.axes[code] = min(low, value), max(high, value)

    def bits(self, select: int, subsel: int) -> bytes:
        """``data`` of the configuration for PROP_BITS, EV_BITS and ABS_INFO; nothing for what there is not."""
        if select == Select.PROP_BITS and not subsel:
            return _bitmap(self.properties)
        if select == Select.EV_BITS:
            return _bitmap(self.codes.get(subsel, ()))
        if select == Select.ABS_INFO and subsel in self.axes:
            low, high = self.axes[subsel]
            return wire.ABSINFO_CODEC.pack(low, high, 0, 0, 0)
        return b""


def face_of(kind: Kind) -> InputFace:
    """The face of a device of that kind, without a recording."""
    if kind == "keyboard":
        return InputFace(
            kind, {Ev.KEY: set(wire.KEYS.values()), Ev.LED: set(Led), Ev.SND: set(Snd), Ev.REP: set(Rep)}, {}
        )
    if kind == "mouse":
        return InputFace(kind, {Ev.KEY: set(_BUTTONS), Ev.REL: set(Rel)}, {}, (Prop.POINTER,))
    if kind == "tablet":
        axes: dict[int, tuple[int, int]] = {Abs.X: _COORDINATE, Abs.Y: _COORDINATE}
        return InputFace(kind, {Ev.KEY: set(_BUTTONS), Ev.REL: {Rel.WHEEL}, Ev.ABS: set(axes)}, axes, (Prop.POINTER,))
    places = (Abs.X, Abs.Y, Abs.MT_POSITION_X, Abs.MT_POSITION_Y)
    axes = {Abs.MT_SLOT: (0, SLOTS - 1), Abs.MT_TRACKING_ID: (0, 0xFFFF), **dict.fromkeys(places, _COORDINATE)}
    return InputFace(kind, {Ev.KEY: {Btn.TOUCH}, Ev.ABS: set(axes)}, axes, (Prop.DIRECT,))


def _bitmap(bits: Iterable[int]) -> bytes:
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


# Characters of a keyboard with US layout: without and with shift.
_PLAIN = "1234567890-=[]\\;'`,./ \n\t"
_SHIFTED = '!@#$%^&*()_+{}|:"~<>?'
_NAMED = "1 2 3 4 5 6 7 8 9 0 minus equal leftbrace rightbrace backslash semicolon apostrophe grave comma dot slash"
_NAMES = [*_NAMED.split(), "space", "enter", "tab"]
CHARACTERS: dict[str, tuple[str, ...]] = {
    **{character: (name,) for character, name in zip(_PLAIN, _NAMES, strict=True)},
    **{character: ("leftshift", name) for character, name in zip(_SHIFTED, _NAMES[: len(_SHIFTED)], strict=True)},
    **{letter: (letter,) for letter in "abcdefghijklmnopqrstuvwxyz"},
    **{letter.upper(): ("leftshift", letter) for letter in "abcdefghijklmnopqrstuvwxyz"},
}
"""Keys that type a character, to be held together."""
