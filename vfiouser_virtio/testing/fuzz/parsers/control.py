"""Commands of a network device's control queue (virtio 1.4, 5.1.9.5): what `devices.net_control` makes of each.

Behind it stand objects that remember what they were told. A command that is refused must have told them nothing.
"""

import logging
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.net_commands import Settings
from vfiouser_virtio.devices.net_control import Control
from vfiouser_virtio.devices.net_statistics import Counter
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.bench import ParserBench
from vfiouser_virtio.testing.fuzz.parsers.chains import SIZE, ChainMemory
from vfiouser_virtio.testing.fuzz.parsers.control_model import (
    ALL_FEATURES,
    ENABLED,
    NEEDS,
    OFFLOADS,
    PAIRS,
    QUEUES,
    STATISTICS,
    STATISTICS_KINDS,
    RefusedCommand,
    Told,
    expected_of,
)


class ControlCase(NamedTuple):
    """Command as its descriptors have it, and the features of its driver."""

    readable: list[bytes]
    writable: list[int]
    features: int


class _Told:
    """In the place of filter, steering, queues, configuration and device: what they are told, in order."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.driver_features = 0
        self.log = DeviceLog(logging.getLogger(__name__), "fuzz")
        self.config = self
        self.queues = [_ToldQueue(self.told, index) for index in range(QUEUES)]

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*values: Any, **named: Any) -> None:
            self.told.append((name, *map(_plain, values), *sorted(named.items())))

        return tell

    def __getitem__(self, name: str) -> int:
        return 3  # `status` of the configuration: LINK_UP and ANNOUNCE

    def negotiated(self, feature: Any) -> bool:
        return bool(self.driver_features & feature.mask)


class _ToldQueue:
    def __init__(self, told: list[Told], index: int) -> None:
        self._told, self._index = told, index
        self.enabled = index in ENABLED
        self.coalescing = (index, 7)

    def coalesce(self, packets: int, usecs: int, *, until_reset: bool = False) -> None:
        self._told.append(("coalesce", self._index, packets, usecs, until_reset))


class ControlCommands(ParserBench[ControlCase]):
    """Commands of the control queue."""

    def __init__(self) -> None:
        self._memory = ChainMemory()
        self._told = told = _Told()
        stand_in = cast("Any", told)
        counters: list[Counter] = [lambda _name: 5] * QUEUES
        self._control = Control(Settings(stand_in, PAIRS, stand_in, stand_in, stand_in.set_offloads, counters))
        self._commands: list[bytes]
        self._features: list[int]

    # ---- cases ---------------------------------------------------------------------------------------------------

    def begin(self, chance: random.Random) -> None:
        self._commands = [_command(chance) for _ in range(1024)]
        self._features = [ALL_FEATURES] * 200 + [ALL_FEATURES & chance.getrandbits(67) for _ in range(56)]

    def make(self, draw: bytes) -> ControlCase:
        command = bytearray(self._commands[draw[0] << 2 | draw[1] & 3])
        for number in range((0, 0, 0, 1, 1, 1, 2, 3)[draw[2] & 7]):
            where, value = draw[4 + 2 * number : 6 + 2 * number]
            if command:
                command[where % min(len(command), 24)] = value if value > 100 else value & 7
        if draw[10] < 30:
            del command[draw[11] % (len(command) + 1) :]
        elif draw[10] < 50:
            command += bytes(1 + draw[11] % 20)
        readable = [bytes(part) for part in (command[:2], command[2:]) if part]
        if draw[12] < 60 and command:
            cut = 1 + draw[13] % len(command)
            readable = [bytes(part) for part in (command[:cut], command[cut:]) if part]
        room = (1, 1, 1, 1, 9, 9, 500, draw[15] & 63)[draw[14] & 7]
        return ControlCase(readable, [room] if room else [], self._features[draw[16]])

    # ---- the oracle ----------------------------------------------------------------------------------------------

    def run(self, made: ControlCase) -> None:
        told, memory = self._told, self._memory
        told.told.clear()
        told.driver_features = made.features
        settings = self._control.settings
        settings.command_num = settings.ok_num = 0
        command, room = b"".join(made.readable), sum(made.writable)
        chain = memory.chain(made.readable, made.writable)
        try:
            self._control.answer(chain)
        except GuestError:
            if room:
                raise
            return
        if not room:
            raise Found("differs", "a command without room for its answer is none", "room")
        start = len(command)
        [_, used] = memory.completed
        answer = bytes(memory.bytes[start : start + used])
        if used > room or memory.bytes != (command + answer).ljust(SIZE, b"\xee"):
            raise Found("write", f"an answer of {used:#x} bytes is not all that was written", "guest memory")
        if command[:2] == bytes(STATISTICS):
            if told.told or answer[0] > 1 or (answer[0] and used > 1):
                raise Found("differs", f"{answer.hex()} answers a question for statistics", "statistics")
            return
        try:
            expected, result = expected_of(command, room - 1, made.features)
            acknowledged = b"\0" + result
        except RefusedCommand:
            expected, acknowledged = [], b"\1"
        if told.told != expected:
            raise Found("differs", f"it is told {told.told}, where {expected} should be"[:300], "told")
        if answer != acknowledged:
            raise Found("differs", f"the answer is {answer.hex()}, where {acknowledged.hex()} should be", "answer")
        if (settings.command_num, settings.ok_num) != (1, int(not acknowledged[0])):
            raise Found("differs", f"{settings.command_num} commands, {settings.ok_num} OK", "counts")

    # ---- files ---------------------------------------------------------------------------------------------------

    def steps(self, made: ControlCase) -> list[Step]:
        readable = [{"do": "read", "data": data.hex()} for data in made.readable]
        return [
            {"do": "driver", "features": made.features},
            *readable,
            *({"do": "write", "size": size} for size in made.writable),
        ]

    def of_steps(self, steps: Sequence[Step]) -> ControlCase:
        first, *others = steps
        if first["do"] != "driver":
            raise ValueError("the first step must be a driver")
        readable = [bytes.fromhex(step["data"]) for step in others if step["do"] == "read"]
        writable = [int(step["size"]) for step in others if step["do"] == "write"]
        if min([1, *writable, *map(len, readable)]) < 1 or sum(writable) + sum(map(len, readable)) > SIZE:
            raise ValueError(f"a chain has descriptors of 1 byte or more, {SIZE:#x} bytes together")
        return ControlCase(readable, writable, int(first["features"]))

    def close(self) -> None:
        """There is nothing to close."""


def _plain(value: Any) -> object:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _command(chance: random.Random) -> bytes:
    """A good command, but for what may be wrong in the numbers of it."""
    kind, number = chance.choice((*NEEDS, (1, 0), (4, 1), (4, 1), (4, 2), (6, 2)))
    head = bytes((kind, number))
    if kind == 0:
        return head + bytes((chance.randrange(2),))
    if kind == 1:
        if number:
            return head + bytes((2,)) + chance.randbytes(5)
        return head + _macs(chance, 0) + _macs(chance, 1)
    if kind == 4 and number:
        length = chance.choice((0, 1, 20, 40, 40, 40, 41))
        types = chance.choice((0, 1, 0x3F, 0x1FF, 0x1FF, 0x200))
        tail = bytes((length,)) + chance.randbytes(max(length + chance.choice((0, 0, 0, 0, 1, -1)), 0))
        if number == 2:
            return head + struct.pack("<I8x", types) + tail
        count = chance.choice((1, 2, 4, 8, 16, 128, 128, 3, 256))
        entries = [chance.randrange(PAIRS) for _ in range(count)]
        start = struct.pack("<IHH", types, count - 1, chance.randrange(PAIRS))
        return head + start + struct.pack(f"<{count}HH", *entries, chance.randrange(1, PAIRS + 1)) + tail
    if kind == 5:
        bits = [bit for bit in OFFLOADS if chance.random() < 0.5] + [chance.randrange(64)] * (chance.random() < 0.1)
        return head + sum(1 << bit for bit in {*bits}).to_bytes(8, "little")
    if kind == 6:
        first = struct.pack("<HH", chance.randrange(QUEUES + 1), 0) if number > 1 else b""
        return head + first + (struct.pack("<II", chance.randrange(300), chance.randrange(300)) if number < 3 else b"")
    if (kind, number) == STATISTICS:
        count = chance.randrange(4)
        asked = [1 << chance.choice(STATISTICS_KINDS) for _ in range(count)]
        return head + b"".join(struct.pack("<HHIQ", chance.randrange(10), 0, 0, each) for each in asked)
    return head + (chance.randrange(1, 6).to_bytes(2, "little") if kind in (2, 4) else b"")


def _macs(chance: random.Random, group: int) -> bytes:
    count = chance.choice((0, 0, 1, 1, 2, 16, 256, 257))
    macs = [bytes((chance.randrange(128) << 1 | group,)) + chance.randbytes(5) for _ in range(count)]
    return (count + (chance.random() < 0.05)).to_bytes(4, "little") + b"".join(macs)
