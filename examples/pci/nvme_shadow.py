"""Doorbells of an NVMe controller in its driver's memory: no register is written while the controller looks there.

Facts: NVM Express Base Specification 2.0c, §5.9 (Doorbell Buffer Config), annex B.5: made for emulated controllers.

::

    shadow   tail of queue 1, head of queue 1, tail of queue 2, …   ◀── the driver, each time
    wanted   tail of queue 1, head of queue 1, tail of queue 2, …   ──▶ the driver writes a register, too, when it
                                                                         goes beyond this value
"""

from collections.abc import Iterable

from pci.nvme_formats import PAGE
from pci.nvme_queues import CompletionQueue, SubmissionQueue

from vfiouser_virtio.pci import Dma

NEVER = 0xFFFF
"""Behind all values that a queue has: its register is written once in a round."""


class ShadowDoorbells:
    """Two pages of the driver's memory: its doorbells, and which of them it is to ring."""

    def __init__(self, dma: Dma, shadow: int, wanted: int) -> None:
        self._dma = dma
        self._shadow = dma.area(shadow, PAGE, kind="I")
        self._wanted = dma.area(wanted, PAGE, write=True, kind="I")

    def is_there(self) -> bool:
        """Whether this memory can be looked at without a message. Raises DmaFault where there is none."""
        return self._shadow.view() is not None and self._wanted.view() is not None

    def look(self, queues: Iterable[SubmissionQueue]) -> list[tuple[SubmissionQueue, int]]:
        """Queues with another tail than they had, and that, whatever it is. Raises DmaFault."""
        words = self._shadow.view()
        if words is None:
            return []
        return [(each, tail) for each in queues if each.number and (tail := words[2 * each.number]) != each.tail]

    def head(self, queue: CompletionQueue) -> int:
        """Up to where the driver has taken completions, whatever it says. Raises DmaFault."""
        words = self._shadow.view()
        return queue.head if words is None else words[2 * queue.number + 1]

    def want_tails(self, queues: Iterable[SubmissionQueue]) -> None:
        """The driver is to ring for what comes next. Look once more after it. Raises DmaFault."""
        words = self._wanted.view()
        if words is not None:
            for each in queues:
                words[2 * each.number] = each.tail
            self._dma.fence()  # this is stored before the tails are loaded again

    def want_head(self, queue: CompletionQueue) -> None:
        """The driver is to ring when it takes completions, or never. Look once more after it. Raises DmaFault."""
        words = self._wanted.view()
        if words is not None:
            words[2 * queue.number + 1] = queue.head if queue.rings else NEVER
            self._dma.fence()  # as above
