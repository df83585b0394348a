"""Areas of guest memory that a device looks at again and again: rings, indexes, doorbells in memory."""

from typing import TYPE_CHECKING, Literal

from vfiouser_virtio.memory import GuestMemory

if TYPE_CHECKING:
    from vfiouser_virtio.pci.dma import Dma

Format = Literal["B", "H", "I", "Q"]
"""Items of a view, as in `memoryview.cast`: bytes, or integers of 16, 32 or 64 bits."""


class DmaArea:
    """Area made by `Dma.area`: looked up once for each memory map of the client, and not for each access."""

    __slots__ = ("_dma", "_format", "_found", "_generation", "_memory", "_range", "_write")

    def __init__(self, dma: "Dma", address: int, length: int, write: bool, kind: Format) -> None:
        self._dma, self._range, self._write = dma, (address, length), write
        self._format: Format = kind
        self._memory: GuestMemory = dma.memory
        self._found: memoryview | None = None
        self._generation = -1

    def view(self) -> memoryview | None:
        """The memory itself, until the next ``await``: items of the area's format.

        None where it has no file descriptor, or is not in one piece: then `Dma.read` and `Dma.write` reach it. Raises
        DmaFault as `Dma.views_nowait`.
        """
        if self._generation == self._memory.generation and self._dma.may_begin:
            return self._found
        return self._look_up()

    def _look_up(self) -> memoryview | None:
        views = self._dma.views_nowait([self._range], write=self._write)
        if views is None or len(views) != 1:
            return None
        self._found = views[0] if self._format == "B" else views[0].cast(self._format)
        self._generation = self._memory.generation
        return self._found
