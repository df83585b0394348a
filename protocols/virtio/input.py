"""Input device (virtio 1.4, 5.8): configuration, events, and the codes of evdev in them.

Event types and codes are those of linux/input-event-codes.h, `RECORDED_EVENT` is struct input_event of linux/input.h.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum

from construct import Bytes, Int8ul, Int16ul, Int32sl, Int64sl, Struct

from vfiouser_virtio.protocols.codec import codec, offsets
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.device_type import (
    ConfigPage,
    DeviceType,
    Exercise,
    RequestShape,
    no_complaint,
)
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.INPUT
MAX_DATA = 128
"""Bytes that one answer of the configuration has at most (5.8.4)."""


class Select(IntEnum):
    """``select`` of the configuration (5.8.4): ``VIRTIO_INPUT_CFG_*``."""

    UNSET = 0x00
    ID_NAME = 0x01
    ID_SERIAL = 0x02
    ID_DEVIDS = 0x03
    PROP_BITS = 0x10
    EV_BITS = 0x11
    ABS_INFO = 0x12


class Ev(IntEnum):
    """Event types: ``EV_*``."""

    SYN = 0x00
    KEY = 0x01
    REL = 0x02
    ABS = 0x03
    MSC = 0x04
    SW = 0x05
    LED = 0x11
    SND = 0x12
    REP = 0x14


class Syn(IntEnum):
    """Codes of EV_SYN: ``SYN_*``. REPORT ends what belongs together."""

    REPORT = 0
    CONFIG = 1
    MT_REPORT = 2
    DROPPED = 3


class Rel(IntEnum):
    """Relative axes: ``REL_*``."""

    X = 0x00
    Y = 0x01
    HWHEEL = 0x06
    WHEEL = 0x08


class Abs(IntEnum):
    """Absolute axes: ``ABS_*``."""

    X = 0x00
    Y = 0x01
    MT_SLOT = 0x2F
    MT_POSITION_X = 0x35
    MT_POSITION_Y = 0x36
    MT_TRACKING_ID = 0x39


class Btn(IntEnum):
    """Buttons, which are keys to EV_KEY: ``BTN_*``."""

    LEFT = 0x110
    RIGHT = 0x111
    MIDDLE = 0x112
    SIDE = 0x113
    EXTRA = 0x114
    TOUCH = 0x14A


class Led(IntEnum):
    """Lights of a keyboard: ``LED_*``."""

    NUML = 0x00
    CAPSL = 0x01
    SCROLLL = 0x02


class Snd(IntEnum):
    """Sounds of a keyboard: ``SND_*``."""

    CLICK = 0x00
    BELL = 0x01
    TONE = 0x02


class Rep(IntEnum):
    """Repetition of keys, which the driver does: ``REP_*``."""

    DELAY = 0x00
    PERIOD = 0x01


class Prop(IntEnum):
    """Properties of a device: ``INPUT_PROP_*``."""

    POINTER = 0x00
    DIRECT = 0x01


BUS_VIRTUAL = 0x06
MAX_TYPE = 0x1F
MAX_CODE = {Ev.SYN: 0x0F, Ev.KEY: 0x2FF, Ev.REL: 0x0F, Ev.ABS: 0x3F, Ev.MSC: 0x07, Ev.SW: 0x10}
"""The last code of each type that a device sends: ``KEY_MAX`` and the like."""

# From code 1 on; "-" is a code without a key.
_KEYS = """
esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace tab q w e r t y u i o p leftbrace rightbrace enter leftctrl
a s d f g h j k l semicolon apostrophe grave leftshift backslash z x c v b n m comma dot slash rightshift kpasterisk
leftalt space capslock f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 numlock scrolllock kp7 kp8 kp9 kpminus kp4 kp5 kp6 kpplus
kp1 kp2 kp3 kp0 kpdot - zenkakuhankaku 102nd f11 f12 ro katakana hiragana henkan katakanahiragana muhenkan kpjpcomma
kpenter rightctrl kpslash sysrq rightalt linefeed home up pageup left right end down pagedown insert delete macro mute
volumedown volumeup power kpequal kpplusminus pause scale kpcomma hangeul hanja yen leftmeta rightmeta compose
"""
KEYS: dict[str, int] = {name: code for code, name in enumerate(_KEYS.split(), 1) if name != "-"}
"""Keys by name, lower-case without ``KEY_``: those of a keyboard with 105 keys, and a few more."""

# struct virtio_input_config (5.8.4); `data` is its union.
CONFIG = Struct("select" / Int8ul, "subsel" / Int8ul, "size" / Int8ul, "reserved" / Bytes(5), "data" / Bytes(MAX_DATA))
Config = record(CONFIG)

# What `data` is for ABS_INFO and ID_DEVIDS.
ABSINFO = Struct("min" / Int32sl, "max" / Int32sl, "fuzz" / Int32sl, "flat" / Int32sl, "res" / Int32sl)
DEVIDS = Struct("bustype" / Int16ul, "vendor" / Int16ul, "product" / Int16ul, "version" / Int16ul)
ABSINFO_CODEC, DEVIDS_CODEC = codec(ABSINFO), codec(DEVIDS)

# struct virtio_input_event (5.8.6); evdev's values are signed.
EVENT = Struct("type" / Int16ul, "code" / Int16ul, "value" / Int32sl)
EVENT_CODEC = codec(EVENT)

# struct input_event, as read from /dev/input/eventN of a 64-bit machine.
RECORDED_EVENT = Struct("sec" / Int64sl, "usec" / Int64sl, "type" / Int16ul, "code" / Int16ul, "value" / Int32sl)
RECORDED_EVENT_CODEC = codec(RECORDED_EVENT)


def _page(name: str, text: Callable[[bytes], str], select: Select, subsel: int = 0) -> ConfigPage:
    def show(fields: Mapping[str, bytes]) -> str:
        data = fields["data"][: fields["size"][0]]
        return text(data) if data else ""

    return ConfigPage(name, {"select": select, "subsel": subsel}, show)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _ids(data: bytes) -> str:
    size = DEVIDS_CODEC.size
    values = DEVIDS_CODEC.unpack(data[:size].ljust(size, b"\0"))
    return " ".join(f"{name} {value:#06x}" for name, value in zip(offsets(DEVIDS), values, strict=True))


def _bits(data: bytes) -> str:
    """How many codes, and the first and the last: a keyboard has a hundred."""
    bits = [bit for bit in range(8 * len(data)) if data[bit // 8] >> bit % 8 & 1]
    return f"{len(bits)} codes, {bits[0]:#x} to {bits[-1]:#x}" if bits else ""


TYPE = DeviceType(
    "input",
    CONFIG,
    queues=("eventq", "statusq"),
    device_id=DEVICE_ID,
    device_fills=("eventq",),
    config_pages=(
        _page("name", _text, Select.ID_NAME),
        _page("serial", _text, Select.ID_SERIAL),
        _page("ids", _ids, Select.ID_DEVIDS),
        _page("properties", _bits, Select.PROP_BITS),
        *(_page(f"EV_{kind.name}", _bits, Select.EV_BITS, kind) for kind in Ev),
    ),
    pci_class=0x098000,
    linux_modules=("virtio_input", "evdev"),
    # A light that is off anyway.
    exercise=Exercise("input", 1, EVENT_CODEC.pack(Ev.LED, Led.SCROLLL, 0), 0, no_complaint),
    requests=(
        RequestShape(queues=(0,), payload=(0, 0, 0, 8), writable=(8, 8, 8, 0, 7, 64), weight=2),
        RequestShape(
            queues=(1,),
            header=EVENT,
            usual={"type": (Ev.LED, Ev.SND, Ev.REP, Ev.SYN), "code": tuple(Led), "value": (0, 1)},
            payload=(0, 0, 0, 8, 100),
            writable=(0, 0, 0, 8),
        ),
    ),
)
