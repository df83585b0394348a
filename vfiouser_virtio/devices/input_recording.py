"""Recordings of input events: what was read from /dev/input/eventN of a 64-bit Linux."""

from collections.abc import Iterator
from pathlib import Path

from vfiouser_virtio.devices.input_face import MAX_FRAME, Event
from vfiouser_virtio.protocols.virtio import input as wire
from vfiouser_virtio.protocols.virtio.input import Ev, Syn
from vfiouser_virtio.virtio import ConfigError, DeviceError

MAX_RECORDING = 16 << 20
"""Bytes of a recording, 700,000 events: all of it is in our memory."""


def recorded(path: Path) -> Iterator[tuple[float, list[Event]]]:
    """Frames of a recording, each with its time in seconds; without lights and sounds, which are the other way.

    Raises ConfigError for a file that is no recording, DeviceError for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORDING + 1)
    except OSError as error:
        raise DeviceError(f"input: cannot read replay {path}: {error.strerror}") from None
    size = wire.RECORDED_EVENT.sizeof()
    if not data or len(data) % size or len(data) > MAX_RECORDING:
        raise ConfigError(
            f"input: replay {path} has {len(data)} bytes, which is no recording of /dev/input/eventN: events of {size} "
            f"bytes, up to {MAX_RECORDING >> 20} MiB"
        )
    frame: list[Event] = []
    for number, (sec, usec, kind, code, value) in enumerate(wire.RECORDED_EVENT_CODEC.iter_unpack(data)):
        if kind > wire.MAX_TYPE or (kind in wire.MAX_CODE and code > wire.MAX_CODE[Ev(kind)]):
            raise ConfigError(f"input: replay {path}: event {number} has type {kind:#x}, code {code:#x}: no recording")
        if kind == Ev.SYN and code == Syn.REPORT:
            if frame:
                yield sec + usec / 1e6, frame
            frame = []
        elif kind in wire.MAX_CODE and not (kind == Ev.SYN and code == Syn.DROPPED):
            frame.append((kind, code, value))
            if len(frame) > MAX_FRAME:
                raise ConfigError(f"input: replay {path}: event {number}: more than {MAX_FRAME} without a SYN_REPORT")
