"""``--trace``: messages between clients and devices, decoded, as lines of text or JSON.

::

    11:04:27.184210 blk0#1 → REGION_WRITE (no reply) BAR4+0x14 device_status = 0x0f
    11:04:27.184301 blk0#1 → REGION_READ BAR4+0x14 device_status 1 bytes
    11:04:27.184344 blk0#1 ← REGION_READ BAR4+0x14 device_status = 0x0f
    11:04:27.184391 blk0#1 → REGION_WRITE BAR4+0xc driver_feature = 0x00000044 (SEG_MAX, BLK_SIZE)
             the device ┘  └ its first connection

    {"time": 1764327867.18421, "monotonic": 5201.06, "device": "blk0", "connection": 1, "direction": "to-device",
     "id": 7, "command": "REGION_WRITE", "type": "request", "no_reply": true, "region": "BAR4", "offset": 20,
     "register": "device_status", "count": 1, "data": "0f", "value": 15}

What is served does not know of it: the same code runs, which takes longer. Nothing waits for the trace's reader.
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime
from enum import IntEnum
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.output_file import LimitedLines, open_output
from vfiouser_virtio.protocols.vfio_user import Direction
from vfiouser_virtio.serving.decode import NameOf, decode, decode_fields, virtio_register
from vfiouser_virtio.serving.feature_words import FeatureWords
from vfiouser_virtio.serving.line_writer import LineWriter
from vfiouser_virtio.serving.terminal import at_end
from vfiouser_virtio.vfio_user import Message, Trace

# Bytes that wait for a disk; a message takes some 150.
_ROOM = 16 << 20
_DIRECTIONS = {Direction.CLIENT_TO_SERVER: ("→", "to-device"), Direction.SERVER_TO_CLIENT: ("←", "from-device")}

WordsOf = Callable[[Message], list[str]]
"""What the bits that are accessed in a message mean."""


class TraceLog:
    """Trace of a whole server. It is a `vfio_user.OpenTrace`."""

    def __init__(self, file: str, *, as_json: bool, limit: int) -> None:
        """``file`` empty is stderr. After ``limit`` bytes there is a last line. Raises ConfigError."""
        self._json = as_json
        self._connections: dict[str, int] = {}
        self._feature_bits: dict[str, type[IntEnum] | None] = {}
        self._names: dict[str, NameOf] = {}
        self._fields: dict[str, WordsOf] = {}
        write: Callable[[str], object] = sys.stderr.write
        if file:
            writer = LineWriter(_open(file), room=_ROOM, lost=self._lost, failed=self._failed)
            self._file = file
            write = writer.write
            at_end(writer)
        self._write = LimitedLines(
            write, limit, self._note(f"the trace ends here: it has {limit} bytes (see --trace-limit)")
        )

    def know(self, device: str, feature_bits: type[IntEnum] | None) -> None:
        """The feature bits of this device's type have these names."""
        self._feature_bits[device] = feature_bits

    def know_registers(self, device: str, name_of: NameOf, words_of: WordsOf) -> None:
        """The registers of this device, which is no virtio device, have these names, and their fields."""
        self._names[device], self._fields[device] = name_of, words_of

    def __call__(self, device: str) -> Trace:
        """The trace of one connection to a device."""
        connection = self._connections[device] = self._connections.get(device, 0) + 1
        fields = self._fields.get(device)
        words_of = fields or FeatureWords(self._feature_bits.get(device)).names
        name_of = self._names.get(device, virtio_register)

        def trace(direction: Direction, message: Message) -> None:
            if self._write.ended:
                return
            arrow, words = _DIRECTIONS[direction]
            now = time.time()
            bits = words_of(message)
            if self._json:
                said: dict[str, object] = {"time": round(now, 6), "monotonic": round(time.monotonic(), 6)}
                said |= {"device": device, "connection": connection, "direction": words}
                said |= decode_fields(message, name_of)
                if bits:
                    said["fields" if fields else "features"] = "; ".join(bits)
                self._write(f"{json.dumps(said)}\n")
            else:
                at = datetime.fromtimestamp(now).strftime("%H:%M:%S.%f")
                named = f" ({'; '.join(bits)})" if bits else ""
                self._write(f"{at} {device}#{connection} {arrow} {decode(message, name_of)}{named}\n")

        return trace

    def _note(self, said: str, **numbers: int) -> str:
        return json.dumps({"note": said, **numbers}) if self._json else said

    def _lost(self, lines: int) -> str:
        return self._note(f"{lines} messages are missing here: they were not read", lost=lines)

    def _failed(self, error: OSError) -> None:
        print(f"vfiouser-virtio: --trace={self._file} ends: {error.strerror}", file=sys.stderr)


def wants_json(file: str, wanted: str | None) -> bool:
    """``--trace-format``, or what the file's name says."""
    return wanted == "json" if wanted else Path(file).suffix in (".json", ".jsonl")


def _open(file: str) -> int:
    """Appending, so that the processes of several devices can write to it; only ours to read: guests' data is in it."""
    try:
        return open_output(file, append=True)
    except OSError as error:
        raise ConfigError(f"--trace={file}: {error.strerror}") from None
