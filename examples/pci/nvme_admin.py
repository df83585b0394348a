"""Commands of an NVMe controller's admin queue: queues, Identify, log pages, features, events.

Facts: NVM Express Base Specification 2.0c, §5; NVM Command Set Specification 1.0c, §4.1.
"""

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from uuid import NAMESPACE_DNS, uuid5

from pci import nvme_formats as formats
from pci.nvme_features import Features
from pci.nvme_formats import ALL_NAMESPACES, NAMESPACE, PAGE, Admin, Command, Failed, Status
from pci.nvme_io import TRANSFER_SHIFT
from pci.nvme_queues import CompletionQueue, SubmissionQueue
from pci.nvme_shadow import ShadowDoorbells

from vfiouser_virtio.pci import DmaFault

if TYPE_CHECKING:
    from pci.nvme import Nvme

MAX_ENTRIES = 1024
"""Of a queue: CAP.MQES and 1."""
MAX_EVENTS = 4
"""Asynchronous Event Requests that wait at a time."""
MAX_ERRORS = 16
"""Entries of the error log."""
CONTIGUOUS, INTERRUPTS = 1, 2


class AdminCommands:
    """Admin queue of ``nvme``: each method takes a command, and returns its result, or None while there is none."""

    def __init__(self, nvme: "Nvme") -> None:
        self.nvme = nvme
        self._uuid = uuid5(NAMESPACE_DNS, f"{nvme.serial}.nvme.vfiouser-virtio.example")
        self._commands: dict[int, Callable[[Command], Awaitable[int | None]]] = {
            Admin.DELETE_SQ: self._delete_sq,
            Admin.CREATE_SQ: self._create_sq,
            Admin.GET_LOG_PAGE: self._get_log_page,
            Admin.DELETE_CQ: self._delete_cq,
            Admin.CREATE_CQ: self._create_cq,
            Admin.IDENTIFY: self._identify,
            Admin.ABORT: self._abort,
            Admin.SET_FEATURES: self._set_features,
            Admin.GET_FEATURES: self._get_features,
            Admin.ASYNC_EVENT: self._async_event,
            Admin.DOORBELL_BUFFER_CONFIG: self._use_shadow,
        }
        self.errors: deque[bytes] = deque(maxlen=MAX_ERRORS)
        self.error_count = 0
        self.reset()

    def reset(self) -> None:
        """The controller was reset: features have their defaults, and no event is asked for."""
        self.features = Features(self.nvme)
        self._event_requests: deque[int] = deque()
        self._events: dict[int, None] = {}

    async def perform(self, queue: SubmissionQueue, command: Command) -> None:
        """Carry a command out, or begin to; nothing of a queue from before a reset."""
        if not queue.alive:
            return
        try:
            make = self._commands.get(command.opcode)
            if make is None:
                raise Failed(Status.INVALID_OPCODE)
            if command.flags:
                raise Failed(Status.INVALID_FIELD)
            result = await make(command)
        except Failed as failed:
            self.nvme.engine.complete(queue, command.cid, failed.status)
        except DmaFault as fault:
            self.nvme.log.once("admin data", "command %#x (opcode %#x): %s", command.cid, command.opcode, fault)
            self.nvme.engine.complete(queue, command.cid, Status.DATA_TRANSFER_ERROR)
        else:
            if result is not None:
                self.nvme.engine.complete(queue, command.cid, result=result)

    def note_error(self, queue: SubmissionQueue, cid: int, status: int) -> None:
        """Remember a failed command for the error log (Base §5.16.1.2)."""
        self.error_count += 1
        self.errors.appendleft(
            struct.pack("<QHHHHQI28x", self.error_count, queue.number, cid, status << 1, 0xFFFF, 0, NAMESPACE)
        )

    # ---- queues (Base §5.5 to §5.8) --------------------------------------------------------------------------------

    async def _create_cq(self, command: Command) -> int:
        nvme, number, size = self.nvme, *self._queue(command, self.nvme.engine.completion)
        vector = command.cdw11 >> 16
        if command.cdw11 & INTERRUPTS and vector >= len(nvme.irq):
            raise Failed(Status.INVALID_INTERRUPT_VECTOR)
        wanted = vector if command.cdw11 & INTERRUPTS else None
        nvme.engine.completion[number] = CompletionQueue(nvme.dma, number, command.prp1, size, wanted)
        return 0

    async def _create_sq(self, command: Command) -> int:
        nvme, number, size = self.nvme, *self._queue(command, self.nvme.engine.submission)
        completions = nvme.engine.completion.get(command.cdw11 >> 16)
        if completions is None or not completions.number:
            raise Failed(Status.COMPLETION_QUEUE_INVALID)
        completions.submitters += 1
        nvme.engine.submission[number] = SubmissionQueue(nvme.dma, number, command.prp1, size, completions)
        return 0

    def _queue(
        self, command: Command, queues: dict[int, CompletionQueue] | dict[int, SubmissionQueue]
    ) -> tuple[int, int]:
        """Number and size of the queue that is to be made."""
        number, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 0 < number <= self.nvme.num_queues or number in queues:
            raise Failed(Status.INVALID_QUEUE_IDENTIFIER)
        if not 2 <= size <= MAX_ENTRIES:
            raise Failed(Status.INVALID_QUEUE_SIZE)
        if not command.cdw11 & CONTIGUOUS:  # CAP.CQR
            raise Failed(Status.INVALID_FIELD)
        if command.prp1 & PAGE - 1:
            raise Failed(Status.PRP_OFFSET_INVALID)
        return number, size

    async def _delete_sq(self, command: Command) -> int | None:
        nvme, number = self.nvme, command.cdw10 & 0xFFFF
        if not number or number not in nvme.engine.submission:
            raise Failed(Status.INVALID_QUEUE_IDENTIFIER)
        queue = nvme.engine.submission.pop(number)
        queue.tail = queue.head  # what was not fetched is not done
        admin = nvme.engine.submission[0]  # by then, a reset may have taken it away

        def deleted() -> None:
            queue.completions.submitters -= 1
            nvme.engine.complete(admin, command.cid)

        if not queue.under_way:
            queue.completions.submitters -= 1
            return 0
        queue.when_idle = deleted
        return None

    async def _delete_cq(self, command: Command) -> int:
        number = command.cdw10 & 0xFFFF
        queue = self.nvme.engine.completion.get(number)
        if not number or queue is None:
            raise Failed(Status.INVALID_QUEUE_IDENTIFIER)
        if queue.submitters:
            raise Failed(Status.INVALID_QUEUE_DELETION)
        del self.nvme.engine.completion[number]
        self.nvme.engine.show_line()
        return 0

    async def _use_shadow(self, command: Command) -> int:
        """Doorbell Buffer Config (Base §5.9): where no look takes a message, which is more than a doorbell does."""
        if command.prp1 & PAGE - 1 or command.prp2 & PAGE - 1:
            raise Failed(Status.PRP_OFFSET_INVALID)
        shadow = ShadowDoorbells(self.nvme.dma, command.prp1, command.prp2)
        if not shadow.is_there():
            raise Failed(Status.INVALID_FIELD)
        self.nvme.engine.shadow = shadow
        return 0

    # ---- what the controller is (Base §5.16, §5.17) ----------------------------------------------------------------

    async def _identify(self, command: Command) -> int:
        which, nvme = command.cdw10 & 0xFF, self.nvme
        disk = nvme.disk
        if which == 0x01:
            data = formats.identify_controller(
                nvme.identity.vendor,
                nvme.serial,
                self._uuid,
                transfer=TRANSFER_SHIFT,
                events=MAX_EVENTS,
                errors=MAX_ERRORS,
                shadow=nvme.dma.views_nowait([(command.prp1, 1)]) is not None,
                writable=not disk.backend.readonly,
                discards=disk.discards,
            )
        elif which == 0x02:
            data = (NAMESPACE if command.nsid < NAMESPACE else 0).to_bytes(PAGE, "little")
            if command.nsid >= ALL_NAMESPACES - 1:
                raise Failed(Status.INVALID_NAMESPACE)
        elif which in (0x00, 0x03):
            if command.nsid != NAMESPACE:
                raise Failed(Status.INVALID_NAMESPACE)
            if which == 0x00:
                data = formats.identify_namespace(
                    disk.blocks,
                    disk.block_size,
                    readonly=disk.backend.readonly,
                    discard_blocks=max(disk.backend.block_size // disk.block_size, 1) if disk.discards else 0,
                )
            else:
                data = formats.namespace_descriptors(self._uuid)
        elif which == 0x06 and not command.cdw11 >> 24:
            data = bytes(PAGE)  # what NVM has of limits of its own: none
        else:
            raise Failed(Status.INVALID_FIELD)
        await self._give(command, data)
        return 0

    async def _get_log_page(self, command: Command) -> int:
        length = 4 * ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1)
        start = command.cdw12 | command.cdw13 << 32
        which = command.cdw10 & 0xFF
        if which == 0x01:
            page = b"".join(self.errors).ljust(64 * MAX_ERRORS, b"\0")
        elif which == 0x02:
            page = self._smart()
        elif which == 0x03:
            page = struct.pack("<B7x8s", 1, formats.FIRMWARE).ljust(512, b"\0")
        elif which == 0x05:
            disk = self.nvme.disk
            page = formats.commands_and_effects(writable=not disk.backend.readonly, discards=disk.discards)
        else:
            raise Failed(Status.INVALID_LOG_PAGE)
        if start & 3 or start > len(page) or length > PAGE << TRANSFER_SHIFT:
            raise Failed(Status.INVALID_FIELD)
        await self._give(command, page[start : start + length].ljust(length, b"\0"))
        return 0

    def _smart(self) -> bytes:
        """SMART / Health Information (Base §5.16.1.3)."""
        disk, page = self.nvme.disk, bytearray(512)
        struct.pack_into("<BHBB", page, 0, 0x08 if disk.backend.readonly else 0, 300, 100, 10)
        for index in range(2):
            page[32 + 16 * index : 48 + 16 * index] = ((disk.moved[index] + 511_999) // 512_000).to_bytes(16, "little")
            page[64 + 16 * index : 80 + 16 * index] = disk.counts[index].to_bytes(16, "little")
        page[176:192] = self.error_count.to_bytes(16, "little")
        return bytes(page)

    async def _give(self, command: Command, data: bytes) -> None:
        """Store the answer to a command where its driver wants it."""
        nvme = self.nvme
        at = 0
        for address, length in await nvme.disk.ranges(command, len(data)):
            await nvme.dma.write(address, data[at : at + length])
            at += length

    # ---- features (Base §5.14, §5.27) ------------------------------------------------------------------------------

    async def _set_features(self, command: Command) -> int:
        return self.features.set(command)

    async def _get_features(self, command: Command) -> int:
        return self.features.get(command)

    # ---- events (Base §5.1, §5.2) ----------------------------------------------------------------------------------

    async def _abort(self, _command: Command) -> int:
        return 1  # it was not aborted, and will end by itself

    async def _async_event(self, command: Command) -> None:
        if len(self._event_requests) >= MAX_EVENTS:
            raise Failed(Status.TOO_MANY_ASYNC_EVENTS)
        self._event_requests.append(command.cid)
        self.nvme.engine.submission[0].under_way -= 1  # it may wait for ever, and the queue must go on
        self._tell_events()

    def doorbell_error(self, information: int) -> None:
        """An error event (Base figure 146): 0, a doorbell of no queue was written; 1, a value that cannot be."""
        self._events[information] = None  # each once, until it is told
        self._tell_events()

    def _tell_events(self) -> None:
        while self._events and self._event_requests:
            information = next(iter(self._events))
            del self._events[information]
            queue = self.nvme.engine.submission[0]
            queue.under_way += 1
            self.nvme.engine.complete(queue, self._event_requests.popleft(), result=0x01 << 16 | information << 8)
