"""NVMe controller with one namespace, a disk in a file or in RAM, for the drivers of Linux, SeaBIOS and EDK II.

Facts: NVM Express Base Specification 2.0c, §3.1.3 (properties), §3.5 (initialization), §3.6 (shutdown); NVMe over PCIe
Transport Specification 1.0c, §3.1.2 (doorbells), §3.5 (interrupts). Its queues are in `nvme_queues`, what is done for
them in `nvme_engine`, and their commands in `nvme_admin` and `nvme_io`.

::

    BAR0  0x00 CAP   0x14 CC     0x24 AQA  sizes of the admin queues      0x1000  tail of submission queue 0
          0x08 VS    0x1c CSTS   0x28 ASQ  address of the submission queue 0x1004  head of completion queue 0
          0x0c INTMS, 0x10 INTMC 0x30 ACQ  and of the completion queue     0x1008  tail of submission queue 1, …

    CC.EN ─▶ run: admin queues ─▶ CSTS.RDY       doorbell ─▶ nvme_engine       CC.EN off ─▶ reset: all is forgotten
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated

import trio
from pci.nvme_admin import MAX_ENTRIES, AdminCommands
from pci.nvme_engine import QueueEngine
from pci.nvme_formats import VERSION
from pci.nvme_io import DiskCommands
from pci.nvme_queues import CompletionQueue, SubmissionQueue

from vfiouser_virtio import DeviceError, Size
from vfiouser_virtio.backends.block import Aio, BlockBackend, Cache
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.opening import check_blocks, check_power_of_two, open_disk
from vfiouser_virtio.pci import (
    BarKind,
    DmaFault,
    Doorbell,
    Identity,
    PciDevice,
    Register,
    array,
    bar,
    field,
    flag,
    interrupts,
)
from vfiouser_virtio.virtio.offer import Poll

MAX_QUEUES = 64
TIMEOUT = 60
"""CAP.TO, in units of 500 ms: how long a driver waits for CSTS.RDY. Requests on the host end before a reset does."""
NVM_COMMAND_SET = 1 << 37
CONTIGUOUS_QUEUES = 1 << 16
NORMAL, OCCURRING, COMPLETE = range(3)
"""CSTS.SHST"""


class Configuration(Register):
    """CC"""

    enable = flag(0)
    command_set = field(6, 4)
    page_size = field(10, 7)
    arbitration = field(13, 11)
    shutdown = field(15, 14)
    sq_entry = field(19, 16)
    cq_entry = field(23, 20)


class State(Register):
    """CSTS"""

    ready = flag(0)
    fatal = flag(1)
    shutdown = field(3, 2)


class AdminSizes(Register):
    """AQA; 0's based."""

    submission = field(11, 0)
    completion = field(27, 16)


class Nvme(PciDevice):
    """Controller. ``Annotated`` parameters are the user's options, as those of the blk device; ``backend`` is for
    programs, and `close` closes it.
    """

    identity = Identity(vendor=0x1234, device=0x4E56, class_code=0x010802, subsystem_vendor=0x1234, subsystem=0x4E56)
    irq = interrupts(MAX_QUEUES + 1, msix_bar=4)
    made_in_thread = True

    regs = bar(0, size=0x4000, kind=BarKind.MEM64)
    cap = Register(
        0x00,
        width=64,
        reset=MAX_ENTRIES - 1 | CONTIGUOUS_QUEUES | TIMEOUT << 24 | NVM_COMMAND_SET,
        access="ro",
    )
    version = Register(0x08, reset=VERSION, access="ro")
    mask_set = Register(0x0C, access="w1s")
    mask_clear = Register(0x10)
    cc = Configuration(0x14)
    csts = State(0x1C, access="ro")
    aqa = AdminSizes(0x24)
    asq = Register(0x28, width=64, writable=~0xFFF & (1 << 64) - 1)
    acq = Register(0x30, width=64, writable=~0xFFF & (1 << 64) - 1)
    memory_buffer = array(Register(0x38, access="ro"), count=2)
    """CMBLOC, CMBSZ: there is none."""
    doorbells = array(Doorbell(0x1000), count=2 * (MAX_QUEUES + 1))

    def __init__(
        self,
        *,
        path: Annotated[Path | None, "raw image file, or block device of the host"] = None,
        size: Annotated[Size | None, "without path: a disk of this size in RAM"] = None,
        readonly: Annotated[bool, "refuse writes, and open the file for reading only"] = False,
        serial: Annotated[str, "serial number, up to 20 characters; default: one that the path makes, or chance"] = "",
        num_queues: Annotated[int, "pairs of I/O queues, 1 to 64; a guest uses up to one per CPU"] = MAX_QUEUES,
        logical_block_size: Annotated[int, "smallest unit that the guest addresses, 512 to 4096 bytes"] = 512,
        aio: Annotated[Aio, "how what may block is done: io_uring; threads; inline"] = "io_uring",
        cache: Annotated[Cache, "writeback: through the host's page cache; none: past it (O_DIRECT)"] = "writeback",
        poll: Annotated[
            Poll, "look at queues for a moment after each command, so that the next need not ring"
        ] = "adaptive",
        discard: Annotated[bool, "let the guest give back space (fstrim), where the host can"] = True,
        backend: BlockBackend | None = None,
    ) -> None:
        check_power_of_two("logical-block-size", logical_block_size, 512, 4096)
        if not 1 <= num_queues <= MAX_QUEUES:
            raise DeviceError(f"num-queues is {num_queues}, not 1 to {MAX_QUEUES}")
        if len(serial.encode()) > 20:
            raise DeviceError(f"serial {serial!r} is longer than 20 bytes")
        super().__init__()
        self.num_queues = num_queues
        backend = open_disk(self.name, path, size, readonly, aio, cache, backend)
        try:
            check_blocks(backend, logical_block_size)
        except DeviceError:
            backend.close()
            raise
        if isinstance(backend, FileBackend):
            for note in backend.notes:
                self.log.warning("%s", note)
        discards = discard and backend.can_discard and not backend.readonly
        self.engine = engine = QueueEngine(self, poll)
        self.disk = DiskCommands(backend, logical_block_size, self.dma, self.log, engine.complete, discards=discards)
        self.disk.freed = engine.wake
        self.serial = serial or _serial(path)
        self.admin = AdminCommands(self)
        self.cc_news = False
        """CC was written."""
        self._running = self._restarting = self._shutting_down = self._takes_commands = False

    # ---- registers -------------------------------------------------------------------------------------------------

    @mask_set.on_write
    def mask_set_written(self) -> None:
        self.mask_clear.value = self.mask_set.value
        self.engine.show_line()

    @mask_clear.on_write
    def mask_clear_written(self, value: int) -> None:
        self.mask_clear.value = self.mask_set.value = self.mask_set.value & ~value
        self.engine.show_line()

    @cc.on_write
    def cc_written(self, _value: int, old: int) -> None:
        enabled = bool(old & 1)
        if enabled and not self.cc.enable:
            self._forget()
            self.csts.shutdown = NORMAL
            self._restarting = True
            self.restart()
            if not self._running:
                self._quiet()
        elif self.cc.shutdown and self.csts.shutdown == NORMAL:
            self.csts.shutdown = OCCURRING if self._running else COMPLETE
            self._shutting_down = self._running
        self.cc_news = True
        self.engine.wake()

    @doorbells.on_write
    def doorbell_written(self, index: int, value: int) -> None:
        if self._takes_commands:
            self.engine.ring(index, value)

    # ---- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self._running = self.cc_news = True
        try:
            async with trio.open_nursery() as nursery:
                if self.disk.starting is not None:
                    nursery.start_soon(self.disk.starting.serve)
                await self._serve(nursery)
        finally:
            # Nothing of before uses memory any more.
            self._running = False
            self._quiet()

    def reset(self) -> None:
        self._forget()

    def close(self) -> None:
        self.disk.backend.close()

    def _quiet(self) -> None:
        if self._restarting:
            self._restarting = False
            self.csts.value = 0

    def _forget(self) -> None:
        """No queue, no command, no event is left."""
        self._takes_commands = self._shutting_down = False
        self.engine.forget()
        self.disk.write_cache = True
        self.admin.reset()
        self.mask_set.value = self.mask_clear.value = 0
        self.engine.show_line()

    def _begin(self) -> None:
        """CC.EN was set: the admin queues are there, or the controller is broken."""
        cc, aqa = self.cc, self.aqa
        if cc.command_set or cc.page_size or cc.arbitration or not aqa.submission or not aqa.completion:
            self.log.once("cc", "it cannot be enabled with CC %#x, AQA %#x", cc.value, aqa.value)
            self.csts.fatal = True
            return
        completions = CompletionQueue(self.dma, 0, self.acq.value, aqa.completion + 1, 0)
        self.engine.completion[0] = completions
        self.engine.submission[0] = SubmissionQueue(self.dma, 0, self.asq.value, aqa.submission + 1, completions)
        self.csts.ready = self._takes_commands = True

    async def _serve(self, nursery: trio.Nursery) -> None:
        while True:
            if self.cc_news:
                self._look_at_cc(nursery)
            idle = True
            if not self.csts.fatal:
                try:
                    idle = await self.engine.work(nursery)
                except DmaFault as fault:
                    self.log.once("fatal", "a queue cannot be reached, so the controller waits for a reset: %s", fault)
                    self.csts.fatal, self._takes_commands = True, False
                    self.engine.drop()
            if idle and not self.cc_news:
                await self.engine.sleep()

    def _look_at_cc(self, nursery: trio.Nursery) -> None:
        self.cc_news = False
        if self.cc.enable and not self.csts.ready and not self.csts.fatal and not self._restarting:
            self._begin()
        if self._shutting_down:
            self._shutting_down = False
            nursery.start_soon(self._shut_down)

    async def _shut_down(self) -> None:
        try:
            await self.disk.backend.flush()
        except OSError as error:
            self.log.error("flush at shutdown failed on the host: %s", error)
        self.csts.shutdown = COMPLETE


def _serial(path: Path | None) -> str:
    """One that no other disk has: Linux takes two controllers with the same for two ways to one disk."""
    return os.urandom(10).hex() if path is None else hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:20]
