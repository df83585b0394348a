"""Guest memory and interrupts for the simulator of a `Bridge`, in the order in which it asks for them."""

from collections import deque
from collections.abc import Sequence

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.pci.dma import Dma, DmaFault
from vfiouser_virtio.pci.irq import Irq
from vfiouser_virtio.pci.simulator_link import SimulatorError, SimulatorLink, SimulatorMessage
from vfiouser_virtio.protocols.rtl_bridge import (
    DMA_CODEC,
    INTERRUPT_CODEC,
    MAX_DMA,
    REPLY,
    InterruptAction,
    RtlMessage,
    RtlStatus,
    pack_message,
)

MAX_WAITING = 256
"""Requests that wait for memory which is reached by messages, of 64 KiB at most each."""
_ACTIONS = frozenset(InterruptAction)


class SimulatorDma:
    """Requests of the simulator of one device to its guest.

    Memory that is mapped is accessed at once. Where it takes messages to the client, requests wait in line for `serve`,
    so that the simulator's other messages go on meanwhile: QEMU gives none of its memory while one of its processors
    waits for a register of ours.
    """

    def __init__(self, dma: Dma, irq: Sequence[Irq], log: DeviceLog) -> None:
        self._dma, self._irq, self._log = dma, irq, log
        self._waiting: deque[SimulatorMessage] = deque()
        self._under_way: SimulatorMessage | None = None  # the first of them, once `serve` has begun with it
        self._void: list[SimulatorMessage] = []  # to be refused behind that, as DMA is answered in order
        self._wake = trio.lowlevel.ParkingLot()

    async def take(self, link: SimulatorLink, message: SimulatorMessage) -> None:
        """Carry out a request, or let it wait. Raises SimulatorError for one that cannot be."""
        if message.kind is RtlMessage.INTERRUPT:
            self._check_interrupt(message)
            at_once = True
        else:
            at_once = self._check_dma(message)
        if at_once and not self._waiting:
            await self._carry_out(link, message)
            return
        if len(self._waiting) >= MAX_WAITING:
            raise SimulatorError(
                f"more than {MAX_WAITING} requests for memory and interrupts without waiting for replies"
            )
        self._waiting.append(message)
        self._wake.unpark_all()

    async def serve(self, link: SimulatorLink) -> None:
        """Carry out what waits, until cancelled."""
        while True:
            while not self._waiting:
                await self._wake.park()
            await link.wait_taken()  # the replies to all that waits are 16 MiB
            if not self._waiting:
                continue
            self._under_way = message = self._waiting[0]
            try:
                await self._carry_out(link, message)
            finally:
                self._under_way = None
                if self._waiting and self._waiting[0] is message:  # a reset has not taken it away
                    self._waiting.popleft()
                void, self._void = self._void, []
                for each in void:
                    self.refuse(link, each)

    def reset(self, link: SimulatorLink | None) -> None:
        """Refuse all that waits: the function has been reset. What is under way is cancelled with its task."""
        waiting, self._waiting = self._waiting, deque()
        if link is None:
            self._void = []
        elif self._under_way is None:
            for message in waiting:
                self.refuse(link, message)
        else:
            self._void += [each for each in waiting if each is not self._under_way]

    @staticmethod
    def refuse(link: SimulatorLink, message: SimulatorMessage) -> None:
        """Tell the simulator that its request was void when it came: it is of before a reset."""
        if message.kind is not RtlMessage.INTERRUPT:
            link.send(pack_message(message.kind | REPLY, message.number, b"", RtlStatus.RESET))

    def _check_interrupt(self, message: SimulatorMessage) -> None:
        _check_body(message, INTERRUPT_CODEC.size)
        vector, action = INTERRUPT_CODEC.unpack(message.body)
        if vector >= len(self._irq) or action not in _ACTIONS:
            raise SimulatorError(f"INTERRUPT {vector:#x}, action {action:#x}, of a function with {len(self._irq)}")

    def _check_dma(self, message: SimulatorMessage) -> bool:
        """Whether it needs no message to the client."""
        if len(message.body) < DMA_CODEC.size:
            raise SimulatorError(f"{message.kind.name} with {len(message.body):#x} bytes")
        address, count = DMA_CODEC.unpack_from(message.body)
        if not 0 < count <= MAX_DMA or address + count > 1 << 64:
            raise SimulatorError(f"{message.kind.name} of {count:#x} bytes at {address:#x}; 1 to {MAX_DMA:#x} can be")
        _check_body(message, DMA_CODEC.size + (count if message.kind is RtlMessage.DMA_WRITE else 0))
        memory = self._dma.memory
        try:
            (memory.readable if message.kind is RtlMessage.DMA_READ else memory.writable)(address, count)
        except NeedsMessages:
            return not self._dma.bus_master
        except Unmapped:
            pass
        return True

    async def _carry_out(self, link: SimulatorLink, message: SimulatorMessage) -> None:
        if message.kind is RtlMessage.INTERRUPT:
            vector, action = INTERRUPT_CODEC.unpack(message.body)
            if action == InterruptAction.TRIGGER:
                self._irq[vector].trigger()
            else:
                self._irq[vector].set(action == InterruptAction.RAISE)
            return
        address, count = DMA_CODEC.unpack_from(message.body)
        status, data = RtlStatus.RESET, b""
        try:
            if message.kind is RtlMessage.DMA_READ:
                data = await self._dma.read(address, count)
            else:
                await self._dma.write(address, memoryview(message.body)[DMA_CODEC.size :])
            status = RtlStatus.OK
        except DmaFault as fault:
            status = RtlStatus.REFUSED
            self._log.once(("fault", message.kind), "the simulator's %s", fault)
        finally:  # cancelled by a reset of the function, too
            link.send(pack_message(message.kind | REPLY, message.number, data, status))


def _check_body(message: SimulatorMessage, expected: int) -> None:
    if len(message.body) != expected:
        raise SimulatorError(f"{message.kind.name} with {len(message.body):#x} bytes instead of {expected:#x}")
