"""PCI device whose logic runs in a simulator of hardware: BAR accesses, DMA and interrupts forwarded over a socket.

::

    class Card(Bridge):                                # all of BAR 0 is the simulator's, but what is declared here
        identity = Identity(vendor=0x1234, device=0x5AC1, class_code=0x120000)
        irq = interrupts(1, msix_bar=1)
        regs = bar(0, size=0x1000)

    guest ──▶ BAR access ──▶ Bridge ──▶ READ, WRITE ──▶ simulator: AXI4-Lite, …        reads are answered late
    guest memory ◀── Dma (Bus Master, IOMMU) ◀── DMA_READ, DMA_WRITE ◀──┤
    guest ◀── MSI-X, MSI, INTx ◀── Irq ◀── INTERRUPT ◀──────────────────┘

The messages are those of `protocols.rtl_bridge`. A simulator that is not there, hangs, dies or lies costs its own
device all-ones reads and a line in the log, and its neighbours nothing.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated, ClassVar

import trio

from vfiouser_virtio.accepting import accept
from vfiouser_virtio.background import background
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.device_log import quoted
from vfiouser_virtio.errors import ConfigError, DeviceError, PeerError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.pci.device import PciDevice
from vfiouser_virtio.pci.simulator_dma import SimulatorDma
from vfiouser_virtio.pci.simulator_link import SimulatorError, SimulatorLink, SimulatorMessage
from vfiouser_virtio.pci.simulator_requests import SimulatorRequests
from vfiouser_virtio.protocols.rtl_bridge import (
    DESCRIPTION_CODEC,
    HELLO_CODEC,
    MAGIC,
    MAX_REASON,
    REPLY,
    VERSION,
    RtlMessage,
    RtlStatus,
    pack_message,
)
from vfiouser_virtio.socket_file import MAX_PATH, bind_path
from vfiouser_virtio.turns import turns
from vfiouser_virtio.vfio_device import AnswerLater, Hold

HELLO_TIMEOUT_S = 10.0
"""Seconds for the first message of a peer, which keeps others waiting."""
MAX_ONE_ACCESS = 64
"""Bytes of one access by a client: a processor makes none longer, and each 8 of them are a request."""
_FROM_SIMULATOR = frozenset({RtlMessage.DMA_READ, RtlMessage.DMA_WRITE, RtlMessage.INTERRUPT})


class Bridge(PciDevice):
    """Device in a simulator. A subclass says what the guest sees: ``identity``, ``irq`` and each `bar`.

    What it declares in a BAR it models itself, and all the rest is the simulator's. The simulator connects to the UNIX
    socket ``simulator`` when it likes, one at a time, and may come again. Raises ConfigError for a path that is too
    long, DeviceError for one that cannot be listened on.
    """

    needs_bus_master: ClassVar[bool] = False
    made_in_thread = True

    def __init__(self, *, simulator: Annotated[Path, "UNIX socket to listen on for the simulator"]) -> None:
        super().__init__()
        self.simulator = simulator
        self._link: SimulatorLink | None = None
        self._requests = SimulatorRequests(self.log)
        self._asked = SimulatorDma(self.dma, self.irq, self.log)
        if len(os.fsencode(simulator)) > MAX_PATH:
            raise ConfigError(f"simulator={simulator}: the path is longer than {MAX_PATH} bytes")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._file = bind_path(self._listener, simulator)
            self._listener.listen(1)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            raise DeviceError(f"simulator={simulator}: {error.strerror}") from None

    # ---- accesses of the guest -------------------------------------------------------------------------------------

    def unmodelled_read(self, bar: int, offset: int, count: int) -> bytes | None:
        """Ask the simulator. Raises AnswerLater; PeerError for an access that no processor makes."""
        link = self._usable(bar, offset, count)
        if link is None or self._requests.hangs or self._requests.full:
            return b"\xff" * count
        asked = [self._requests.read(link, bar, at, size) for at, size in _aligned(offset, count)]
        asked[-1].hold = hold = Hold(on_expire=self._requests.no_answer)  # they are answered in order
        raise AnswerLater(hold, lambda: b"".join(each.data for each in asked))

    def unmodelled_write(self, bar: int, offset: int, data: bytes) -> bool:
        """Tell the simulator. Raises AnswerLater when it has much to do already; errors as `unmodelled_read`."""
        link = self._usable(bar, offset, len(data))
        if link is None:
            return True
        if self._requests.full:
            text = "the simulator does not answer, and has much to do already: a write of BAR%d+%#x and others are lost"
            self.log.once("lost", text, bar, offset)
            return True
        for at, size in _aligned(offset, len(data)):
            self._requests.write(link, bar, at, data[at - offset : at - offset + size])
        hold = self._requests.writer_waits()
        if hold is not None:
            raise AnswerLater(hold)
        return True

    def reset(self) -> None:
        """See `PciDevice`: the simulator is told, and what it does until it has answered is of before."""
        link = self._link
        self._asked.reset(link)
        if link is None or not link.greeted:
            return
        if self._requests.full:
            link.cut_off("it answers neither accesses nor resets")
        else:
            self._requests.reset(link)

    def client_left(self) -> None:
        """See `PciDevice`: the next client does not wait for what the simulator owes this one."""
        self._requests.give_up()

    def _usable(self, bar: int, offset: int, count: int) -> SimulatorLink | None:
        if count > MAX_ONE_ACCESS:
            where = f"BAR{bar}+{offset:#x}, which a simulator answers"
            raise PeerError(f"access of {count:#x} bytes at {where}: {MAX_ONE_ACCESS:#x} at most")
        if self._link is not None and self._link.greeted:
            return self._link
        self.log.once("absent", "no simulator has connected to %s: registers read as all-ones", self.simulator)
        return None

    # ---- the simulator ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """See `PciDevice`: serves one simulator after another; a reset of the function does not end its connection."""
        while True:
            if self._link is None:
                self._link = SimulatorLink(await accept(self._listener, self.log, f"simulator={self.simulator}"))
            link = self._link
            async with background() as tasks:
                tasks.start_soon(link.flush)
                tasks.start_soon(self._asked.serve, link)
                try:
                    why = await self._converse(link)
                except SimulatorError as error:
                    why = f"it sent {error}"
            self._drop(link, why)

    async def _converse(self, link: SimulatorLink) -> str:
        """Deal with what the simulator sends, until it is gone: why that is; empty where it has said so itself."""
        if not link.greeted:
            with trio.move_on_after(HELLO_TIMEOUT_S):
                while not link.gone and not link.greeted:
                    message = link.next()
                    if message is None:
                        await link.receive()
                    else:
                        self._greet(link, message)
            if not link.greeted:
                return link.gone or f"it has not said HELLO for {HELLO_TIMEOUT_S:g} s"
        slice_end, number = turns().woken(0)
        while not link.gone:
            while (message := link.next()) is not None:
                if message.kind is RtlMessage.END:
                    text = message.body[:MAX_REASON].decode(errors="replace")
                    self.log.info("the simulator has ended: %s", quoted(text))
                    return ""
                await self._take(link, message)
                await link.wait_taken()
                if perf_counter() > slice_end:
                    slice_end = await turns().wait()
            await link.receive()
            slice_end, number = turns().woken(number)
        return link.gone

    def _greet(self, link: SimulatorLink, message: SimulatorMessage) -> None:
        if message.kind is not RtlMessage.HELLO or message.is_reply or len(message.body) != HELLO_CODEC.size:
            raise SimulatorError(f"{message.kind.name} of {len(message.body):#x} bytes instead of HELLO")
        magic, version = HELLO_CODEC.unpack(message.body)
        if magic != MAGIC or version != VERSION:
            link.send(pack_message(RtlMessage.HELLO | REPLY, message.number, b"", RtlStatus.FAILED))
            raise SimulatorError(f"HELLO {magic!r} of version {version:#x}, not {MAGIC!r} of {VERSION:#x}")
        identity = self.identity
        if self.irq_lines.function is not None:  # options may say otherwise than the class
            identity = self.irq_lines.function.identity
        sizes = [self.bars[index][0].size if index in self.bars else 0 for index in range(6)]
        shown = identity.subsystem_vendor, identity.subsystem, identity.class_code
        body = DESCRIPTION_CODEC.pack(VERSION, identity.vendor, identity.device, *shown, len(self.irq), *sizes)
        link.greeted = True
        self.log.forget()
        self.log.info("a simulator has connected to %s", self.simulator)
        link.send(pack_message(RtlMessage.HELLO | REPLY, message.number, body))

    async def _take(self, link: SimulatorLink, message: SimulatorMessage) -> None:
        if message.is_reply:
            self._requests.answered(message)
        elif message.kind not in _FROM_SIMULATOR:
            raise SimulatorError(f"{message.kind.name}, which only a bridge asks for")
        elif self._requests.resets:
            self._asked.refuse(link, message)
        else:
            await self._asked.take(link, message)

    def _drop(self, link: SimulatorLink, why: str) -> None:
        """The simulator is gone, or has to go."""
        self._link = None
        if why:
            text = "the simulator is gone (%s): registers read as all-ones until one connects to %s"
            self.log.once("gone", text, why, self.simulator)
            link.send(pack_message(RtlMessage.END, 0, why.encode()[:MAX_REASON]))
        link.close()
        self._asked.reset(None)
        self._requests.forget()
        for each in self.irq:
            each.clear()

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`."""
        return HostAccess(removes=(self._file.path,))

    def close(self) -> None:
        """See `PciDevice`."""
        link, self._link = self._link, None
        if link is not None:
            link.send(pack_message(RtlMessage.END, 0, b"the device is no longer served"))
            link.close()
            self._requests.forget()
        if self._listener.fileno() >= 0:
            briefly(self._file.remove)
            self._listener.close()


def _aligned(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """The pieces of an access, each of 1, 2, 4 or 8 bytes at a multiple of that: offset and size."""
    end = offset + count
    while offset < end:
        size = next(size for size in (8, 4, 2, 1) if offset % size == 0 and offset + size <= end)
        yield offset, size
        offset += size
