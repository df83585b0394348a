"""An entropy device that throws dice: the smallest device that an unmodified Linux uses.

vfiouser-virtio run --device examples/dice.py:Dice,sides=6 --exec 'head -c 20 /dev/hwrng; echo'
"""

import random
from typing import Annotated

from vfiouser_virtio import Device, DeviceError, main, queue

MOST = 4096
"""Bytes for one request: what it asks for is the guest's choice, and the work of one turn is ours."""


class Dice(Device):
    """Each byte is the digit of one throw."""

    device_id = 4
    requestq = queue(max_size=8)

    def __init__(self, *, sides: Annotated[int, "how many sides a die has, 1 to 9"] = 6) -> None:
        if not 1 <= sides <= 9:
            raise DeviceError(f"sides is {sides}, not 1 to 9")
        super().__init__()
        self.faces = b"123456789"[:sides]

    async def run(self) -> None:
        async for chain in self.requestq:
            count = min(chain.writable.length, MOST)
            chain.writable.write(bytes(random.choices(self.faces, k=count)))
            chain.complete()


if __name__ == "__main__":
    main(Dice)
