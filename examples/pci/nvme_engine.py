"""Work of an NVMe controller: commands go from its queues to those that carry them out, and completions back.

Facts: NVM Express Base Specification 2.0c, §3.3 (queues), §5.9 (doorbells in memory); NVMe over PCIe Transport
Specification 1.0c, §3.5 (interrupts).

::

    doorbell ──┐                ┌─▶ queue 0: admin ──┐                     ┌─▶ one interrupt for all that are there
               ├▶ work: fetch ──┤                    ├─▶ complete, store ──┤
    in memory ─┘                └─▶ others: disk ────┘                     └─▶ look for more, ask to be rung, sleep
"""

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING

import trio
from pci.nvme_formats import COMMAND, Command
from pci.nvme_queues import CompletionQueue, SubmissionQueue
from pci.nvme_shadow import ShadowDoorbells

from vfiouser_virtio.pci import DmaFault
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio.offer import Poll
from vfiouser_virtio.virtio.polling import Polling

if TYPE_CHECKING:
    from pci.nvme import Nvme


class QueueEngine:
    """Queues of ``nvme``, and what there is to do for them."""

    def __init__(self, nvme: "Nvme", poll: Poll) -> None:
        self.submission: dict[int, SubmissionQueue] = {}
        self.completion: dict[int, CompletionQueue] = {}
        self.shadow: ShadowDoorbells | None = None
        """Doorbells in memory, once the driver has set them up."""
        self._nvme = nvme
        self._polling = Polling(poll)
        self._rung: dict[SubmissionQueue, None] = {}
        self._ended: dict[CompletionQueue, None] = {}
        self._look_due = self._line = False
        self._slice_end, self._round = 0.0, 0
        self._sleeper: trio.lowlevel.Task | None = None

    def forget(self) -> None:
        """No queue, no command, no event is left."""
        for queue in self.submission.values():
            queue.alive = False
        self.submission.clear()
        self.completion.clear()
        self.drop()
        self.shadow = None

    def drop(self) -> None:
        """There is nothing to do any more."""
        self._rung.clear()
        self._ended.clear()
        self._look_due = False

    # ---- what wakes it ---------------------------------------------------------------------------------------------

    def ring(self, index: int, value: int) -> None:
        """A doorbell: tails of submission queues have even ``index``, heads of completion queues odd ones."""
        number = index >> 1
        queue, completions = self.submission.get(number), self.completion.get(number)
        if (completions if index & 1 else queue) is None:
            self._nvme.admin.doorbell_error(0)
        elif self.shadow is not None and number:
            self._look_due = True  # in memory, which is where the value is that counts: this one may be older
            self.wake()
            if completions is not None and index & 1:
                self._look_at_head(completions, self.shadow)
        elif queue is not None and not index & 1:
            self._tail(queue, value)
        elif completions is not None:
            self._head(completions, value)

    def _look_at_head(self, completions: CompletionQueue, shadow: ShadowDoorbells) -> None:
        """At once, not when the task has its turn: INTx that is still up then comes again.

        QEMU ends it with the driver's access, and asks next. Linux' driver would find nothing and access nothing.
        """
        with contextlib.suppress(DmaFault):  # which the task will meet, too
            self._head(completions, shadow.head(completions))

    def _tail(self, queue: SubmissionQueue, value: int) -> None:
        if value >= queue.size:
            self._nvme.admin.doorbell_error(1)
        else:
            queue.tail = value
            self._rung[queue] = None
            if self._sleeper is not None:
                self.wake()

    def _head(self, completions: CompletionQueue, value: int) -> None:
        moved = (value - completions.head) % completions.size
        if value >= completions.size or moved > completions.used:
            self._nvme.admin.doorbell_error(1)
        elif moved:
            completions.head = value
            if completions.waiting:
                self._ended[completions] = None
                self.wake()
            self.show_line()

    def complete(self, queue: SubmissionQueue, cid: int, status: int = 0, result: int = 0) -> None:
        """A command has ended; nothing where its queue is no more."""
        if queue.alive:
            if status:
                self._nvme.admin.note_error(queue, cid, status)
            queue.completions.waiting.append((queue, cid, status, result))
            self._ended[queue.completions] = None
            if self._sleeper is not None:
                self.wake()

    def wake(self) -> None:
        """End `sleep`."""
        task, self._sleeper = self._sleeper, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def sleep(self) -> None:
        """Wait for `wake`. A ParkingLot does the same for many tasks, and takes 2 µs more."""
        self._sleeper = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        await trio.lowlevel.checkpoint_if_cancelled()  # there may have been a reset after what has woken it
        self._slice_end, self._round = turns().woken(self._round)

    # ---- what it does ----------------------------------------------------------------------------------------------

    async def work(self, nursery: trio.Nursery) -> bool:
        """Some commands of each queue with news, and all completions that there are then; whether that was all.

        Raises DmaFault where a queue cannot be reached.
        """
        if self._look_due:
            self._look_due = False
            self._look()
        for _ in range(len(self._rung)):
            queue = next(iter(self._rung))
            del self._rung[queue]
            if queue.number and self._nvme.disk.full:
                self._rung[queue] = None
                continue
            for command in map(Command._make, COMMAND.iter_unpack(await queue.fetch())):
                if queue.number:
                    self._nvme.disk.perform(queue, command, nursery)
                else:
                    await self._nvme.admin.perform(queue, command)
                if perf_counter() > self._slice_end:  # one moves up to 1 MiB
                    await self._store_all()
                    self._slice_end = await turns().wait()
            if queue.alive and queue.head != queue.tail and not queue.waits:
                self._rung[queue] = None
            if perf_counter() > self._slice_end or not self._rung:
                break
        await self._store_all()
        if self._has_news() or await self._poll():
            if perf_counter() > self._slice_end:
                self._slice_end = await turns().wait()
            return False
        return True

    async def _store_all(self) -> None:
        while self._ended:
            completions, _ = self._ended.popitem()
            await self._store(completions)

    async def _store(self, completions: CompletionQueue) -> None:
        shadow = self.shadow if completions.number else None
        if shadow is not None and completions.used + len(completions.waiting) >= completions.size:
            self._head(completions, shadow.head(completions))
        freed = await completions.store()
        if shadow is not None:
            wanted = bool(completions.waiting) or not self._nvme.irq[0].by_message
            if wanted or completions.rings:
                completions.rings = wanted
                shadow.want_head(completions)
                self._head(completions, shadow.head(completions))
        if freed is None:
            return
        if completions.vector is not None and not self._nvme.irq[completions.vector].message():
            self.show_line()
        for queue in freed:
            queue.waits = False
            if queue.head != queue.tail:
                self._rung[queue] = None
            if queue.when_idle is not None and not queue.under_way:
                queue.when_idle()
                queue.when_idle = None

    def show_line(self) -> None:
        """INTx: up while there are completions that the driver has not taken, and wants to hear of (PCIe §3.5.1)."""
        nvme = self._nvme
        line = nvme.irq[0]
        up = not line.by_message and any(
            each.used and each.vector is not None and not nvme.mask_set.value >> each.vector & 1
            for each in self.completion.values()
        )
        if up != self._line:
            self._line = up
            line.set(up)

    # ---- doorbells in memory ---------------------------------------------------------------------------------------

    async def _poll(self) -> bool:
        """Look whether there is something that is told in memory alone, for a moment. Raises DmaFault."""
        shadow, polling = self.shadow, self._polling
        if shadow is None:
            return False
        may_spin = polling.should_spin()
        if self._look():  # mostly so where others have had the CPU meanwhile
            return True
        if may_spin:
            if await polling.spin(self._look, self._under_way, held=self._held, reap=self._reap):
                self._slice_end, self._round = turns().woken(self._round)
            if self._has_news():
                return True
        shadow.want_tails(self.submission.values())
        return self._look()

    def _look(self) -> bool:
        """Whether there is news, also in the doorbells that are in memory. Raises DmaFault."""
        shadow = self.shadow
        if shadow is not None:
            for queue, tail in shadow.look(self.submission.values()):
                self._tail(queue, tail)
            if self._rung:  # not for a tail that cannot be, which is there at each look
                self._polling.filled()
            for number, completions in self.completion.items():
                if number and completions.rings and completions.used:
                    self._head(completions, shadow.head(completions))
        return self._has_news()

    def _has_news(self) -> bool:
        return bool(self._may_begin() or self._ended or self._look_due or self._nvme.cc_news)

    def _may_begin(self) -> bool:
        """Whether there are commands to be begun now: those of the admin queue always."""
        return bool(self._rung) and (not self._nvme.disk.full or any(not queue.number for queue in self._rung))

    def _under_way(self) -> int:
        return sum(each.under_way for each in self.submission.values())

    def _held(self) -> int:
        return self._nvme.disk.held

    def _reap(self) -> bool:
        starting = self._nvme.disk.starting
        return starting is not None and starting.reap()
