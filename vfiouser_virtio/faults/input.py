"""Faults of input devices: events, and the ranges of axes."""

from vfiouser_virtio.faults.payload import Say, UsedBuffer, number
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio.input import ABSINFO, CONFIG, EVENT, EVENT_CODEC, Ev, Select, Syn
from vfiouser_virtio.virtio import Device

EVENTQ = 0
_END = EVENT_CODEC.pack(Ev.SYN, Syn.REPORT, 0)
_DATA, _ = offsets(CONFIG)["data"]
_MIN, _MAX = (_DATA + offsets(ABSINFO)[name][0] for name in ("min", "max"))


class InputPayload:
    """Faults of the event queue; ``say`` sends an event."""

    def __init__(self, faults: FaultPlan, say: Say) -> None:
        self._faults, self._say = faults, say
        self._before = _END

    def spoil(self, buffer: UsedBuffer) -> None:
        """As `Payload.spoil`."""
        event = buffer.read(0, EVENT.sizeof())
        if buffer.length < len(event) or len(event) < EVENT.sizeof():
            return  # one that had no room for an event
        if event != _END:
            self._before = event
        elif hit := self._faults.hit("input-no-syn"):
            hit.did(f"{self._before.hex()} once more")
            buffer.write(0, self._before)
        if hit := self._faults.hit("input-event"):
            self._say(event_of(hit))


def event_of(hit: Hit) -> bytes:
    """The event of a fault, which is logged."""
    event = number(hit, "type", 2) + number(hit, "code", 2) + number(hit, "value", 4)
    hit.did(f"type {hit['type']:#x}, code {hit['code']:#x}, value {hit['value']:#x}")
    return event


def spoil_absinfo(faults: FaultPlan, device: Device, data: bytearray, offset: int) -> None:
    """``data`` is what a driver reads of the configuration at ``offset``."""
    if device.config["select"] != Select.ABS_INFO or not device.config["size"]:
        return
    if offset >= _MAX + 4 or offset + len(data) <= _MIN:
        return
    if hit := faults.hit("input-absinfo"):
        wrong = number(hit, "min", 4) + number(hit, "max", 4)
        begin, end = max(_MIN, offset), min(_MAX + 4, offset + len(data))
        data[begin - offset : end - offset] = wrong[begin - _MIN : end - _MIN]
        hit.did(f"axis {device.config['subsel']!r} goes from {hit['min']} to {hit['max']}")
