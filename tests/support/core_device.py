"""A device that echoes and counts its runs and resets, for tests of the device core."""

import pytest
from construct import Byte, Int16ul, Int32ul, Struct

from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.virtio import Device, queue

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])
Config = record(Struct("value" / Int32ul, "knob" / Byte, "tail" / Int16ul))


class Echo(Device):
    device_id = 63
    driver_writes = frozenset({"knob"})
    requestq = queue(max_size=8)
    otherq = queue(max_size=4)

    def __init__(self) -> None:
        super().__init__(config=Config(value=7), features=1 << 5)
        self.runs = self.ended = self.resets = 0
        self.knobs: list[int | bytes] = []

    async def run(self) -> None:
        self.runs += 1
        try:
            async for chain in self.requestq:
                chain.writable.write(chain.readable.read())
                chain.complete()
        finally:
            self.ended += 1

    def config_written(self, field: str, value: int | bytes) -> None:
        self.knobs.append(value)

    def reset(self) -> None:
        self.resets += 1
