"""Design in a simulator, driven by cocotb, that answers for a bridge: when simulated time passes, and when it does not.

::

    @cocotb.test()
    async def serve(dut):
        Clock(dut.clk, 10, "ns").start()
        with connect_to_bridge(os.environ["BRIDGE"]) as bridge:
            card = BridgedDesign(bridge, dut.clk, reset=dut.rst, busy=[dut.busy])
            card.registers[0] = AxiLiteMaster(dut, "s_axil", dut.clk)       # BAR 0
            card.add_memory(AxiMemory(dut, "m_axi", dut.clk, card))
            card.add_interrupt(0, dut.irq)
            await card.serve()

    guest      ──── runs ────┬ waits ┬── runs ──┬ waits ┬──── runs ──────────▶ real time
    requests                 READ    │          WRITE   │
    design     ─ stands still ┴▶▶▶▶▶▶┴▶settle▶──┴▶▶▶▶▶▶▶┴▶ busy ▶▶▶▶┬ stands still ▶
                                                      DMA_READ: stands still until it is answered

A simulator advances while its coroutines wait for its triggers, and stands still while Python waits for anything else:
`BridgedDesign` waits for the bridge's socket whenever nothing is to be done in the design. So a clock of 10 ns that
takes 20 µs to simulate does not count while the guest computes, and memory answers in no simulated time.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cocotb
from cocotb.triggers import Event, ReadOnly, RisingEdge, ValueChange

from vfiouser_virtio.protocols.rtl_bridge import InterruptAction, RtlMessage, RtlStatus
from vfiouser_virtio.rtl.client import BridgeClient, BridgeEnded, BridgeRequest, DmaTransfer

RESET_CLOCKS = 4
SETTLE_CLOCKS = 8
"""Clocks after each request and after the design was busy last: it may become busy in them, or raise an interrupt."""


class RegisterError(Exception):
    """Access that the design refuses (SLVERR, DECERR), or does not answer."""


class RegisterBus(Protocol):
    """Master on the bus of a design's registers. Both methods raise RegisterError."""

    async def read(self, offset: int, count: int) -> bytes:
        """Read ``count`` bytes: 1, 2, 4 or 8, at a multiple of that."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Write as many."""
        ...


class MemoryBus(Protocol):
    """Memory on a bus of which the design is master, with tasks that carry out its accesses."""

    def restart(self) -> None:
        """Begin, or begin anew: the design is in reset."""
        ...


class BridgedDesign:
    """Design whose clock is the signal ``clock``; see the example above.

    ``reset`` is the signal of its reset, with the level ``reset_active``; without, a reset of the function does
    nothing. While one of the signals ``busy`` is high, simulated time goes on though the guest asks for nothing: DMA is
    under way, a timer runs.
    """

    def __init__(
        self,
        client: BridgeClient,
        clock: Any,
        *,
        reset: Any = None,
        reset_active: int = 1,
        busy: Sequence[Any] = (),
        settle: int = SETTLE_CLOCKS,
    ) -> None:
        self.client, self.clock = client, clock
        self.registers: dict[int, RegisterBus] = {}
        """The master for each BAR, by index."""
        self._reset, self._reset_active = reset, reset_active
        self._busy = [_is_high(each) for each in busy]
        self._settle = settle
        self._memories: list[MemoryBus] = []
        self._answering = False

    def add_memory(self, memory: MemoryBus) -> None:
        """Guest memory on a bus of the design."""
        self._memories.append(memory)

    def add_interrupt(self, vector: int, signal: Any) -> None:
        """Interrupt ``vector`` follows the level of ``signal``: a message each time that it rises, or INTx."""
        cocotb.start_soon(self._watch(vector, signal))

    async def serve(self) -> None:
        """Answer for the bridge until it ends. Begins with a reset of the design."""
        await self._reset_design()
        left = 0
        try:
            while True:
                if self.client.requests:
                    self._answering = True
                    await self._answer(self.client.requests.popleft())
                    self._answering = False
                    left = self._settle
                elif left:
                    left = self._settle if any(busy() for busy in self._busy) else left - 1
                    self.client.pump(0)
                    await RisingEdge(self.clock)
                else:
                    self.client.pump(None)  # simulated time stands still
        except BridgeEnded as end:
            cocotb.log.info("the bridge has ended: %s", end)

    # ---- memory, for a MemoryBus -----------------------------------------------------------------------------------

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read guest memory, 64 KiB at most. Raises `DmaRefused`.

        Simulated time stands still meanwhile, unless the guest wants something of the design.
        """
        return await self._wait(lambda: self.client.begin_read(address, count))

    async def dma_write(self, address: int, data: bytes) -> None:
        """Store to guest memory; returns when it is there. As `dma_read`."""
        await self._wait(lambda: self.client.begin_write(address, data))

    async def _wait(self, begin: Callable[[], DmaTransfer]) -> bytes:
        try:
            transfer = begin()
            while transfer.status is None:
                if self._answering or self.client.requests:
                    # QEMU gives no memory while one of its processors waits for a register; the design may answer that.
                    self.client.pump(0)
                    await RisingEdge(self.clock)
                else:
                    self.client.pump(None)
        except BridgeEnded:
            await Event().wait()  # `serve` ends the test
            raise
        return transfer.result()

    # ---- the rest --------------------------------------------------------------------------------------------------

    async def _answer(self, request: BridgeRequest) -> None:
        if request.kind is RtlMessage.RESET:
            await self._reset_design()
            self.client.reply(request)
            return
        bus = self.registers.get(request.bar)
        try:
            if bus is None:
                raise RegisterError("no bus for this BAR")
            if request.kind is RtlMessage.READ:
                self.client.reply(request, await bus.read(request.offset, request.count))
            else:
                await bus.write(request.offset, request.data)
                self.client.reply(request)
        except RegisterError as error:
            cocotb.log.warning("%s at BAR%d+%#x: %s", request.kind.name, request.bar, request.offset, error)
            self.client.reply(request, status=RtlStatus.REFUSED)

    async def _reset_design(self) -> None:
        if self._reset is not None:
            self._reset.value = self._reset_active
            for _ in range(RESET_CLOCKS):
                await RisingEdge(self.clock)
        for memory in self._memories:
            memory.restart()
        if self._reset is not None:
            self._reset.value = 1 - self._reset_active
            await RisingEdge(self.clock)

    async def _watch(self, vector: int, signal: Any) -> None:
        level, is_high = False, _is_high(signal)
        while True:
            if is_high() != level:
                level = not level
                try:
                    self.client.interrupt(vector, InterruptAction.RAISE if level else InterruptAction.LOWER)
                except BridgeEnded:
                    return
            await ValueChange(signal)
            await ReadOnly()  # what it settles to in this moment


def _is_high(signal: Any) -> Callable[[], bool]:
    """Whether a signal is 1 now: not 0, X or Z."""
    return lambda: str(signal.value) == "1"
