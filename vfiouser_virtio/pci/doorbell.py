"""Doorbells: registers that are there to wake the device's task."""

from collections.abc import Collection
from typing import Self

from vfiouser_virtio.pci.register import Register


class Doorbell(Register):
    """Register that a driver can only write, and that a device waits for in its `run`.

    ::

        tail = Doorbell(0x18)

        async def run(self) -> None:
            async for tail in self.tail:         # see `Register.wait_written`
                ...
    """

    def __init__(self, offset: int, *, width: int = 32, widths: Collection[int] = (), bar: int | None = None) -> None:
        super().__init__(offset, width=width, access="wo", widths=widths, bar=bar)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        return await self.wait_written()
