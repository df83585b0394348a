"""Serial card with one 16550A, for Linux' 8250_pci, which takes any card of this class with eight I/O ports.

Facts: Texas Instruments, PC16550D data sheet SNLS378C, registers and priorities of interrupts (§8.6); PCI Code and ID
Assignment Specification: class 07, sub-class 00, interface 02 is a 16550. What is written is sent as fast as the host
takes it, whatever the divisor says; what waits in the FIFO has always reached its trigger level, or timed out.
"""

from collections import deque
from typing import Annotated

import trio

from vfiouser_virtio import main
from vfiouser_virtio.backends.chardev import Chardev
from vfiouser_virtio.backends.chardev_spec import SPECS, open_chardev
from vfiouser_virtio.pci import BarKind, Identity, PciDevice, Register, bar, flag, interrupts

FIFO = 16
RECEIVED, EMPTY, LINE, MODEM = 0x01, 0x02, 0x04, 0x08
"""Interrupt enable register: bytes were received, the transmitter is empty, an error, a change of the modem's lines."""
OVERRUN = 0x02
TRANSMITTER_IDLE = 0x60
LINES_UP = 0xB0
"""Modem status register with carrier, data set ready and clear to send: the other end is there."""


class LineControl(Register):
    divisor_latch = flag(7, access="rw")
    """Ports 0 and 1 are the divisor of the baud rate meanwhile."""


class ModemControl(Register):
    loop = flag(4)
    """What is sent is received, and the outputs DTR, RTS, OUT1, OUT2 are the modem's lines."""


class Uart(PciDevice):
    """Its wire ends in a plug that sends back what comes, or at a ``chardev`` on the host."""

    identity = Identity(vendor=0x1234, device=0x16C5, class_code=0x070002)
    irq = interrupts(1)
    needs_bus_master = False

    ports = bar(0, size=8, kind=BarKind.IO)
    data = Register(0, width=8)
    enable = Register(1, width=8)
    ident = Register(2, width=8, access="ro")
    """A read identifies the interrupt, a write is FIFO control."""
    line_control = LineControl(3, width=8, writable=0xFF)
    modem_control = ModemControl(4, width=8, writable=0x1F)
    line_status = Register(5, width=8, access="ro")
    modem_status = Register(6, width=8, access="ro", reset=LINES_UP)
    scratch = Register(7, width=8)

    def __init__(
        self,
        *,
        chardev: Annotated[str | Chardev | None, f"host side of the wire: {SPECS}; default: a plug, no host"] = None,
    ) -> None:
        super().__init__()
        self.chardev = open_chardev(chardev) if isinstance(chardev, str) else chardev
        self.wire: deque[int] = deque()
        """What comes over the wire: the first 16 bytes are in the FIFO, the others wait."""
        self.out: bytearray
        """What the driver sends: it may not write more before this is empty."""
        self._news = trio.Event()
        self.reset()

    def describe(self) -> str:
        """Where the other end is on the host."""
        return self.chardev.describe() if self.chardev is not None else "a plug"

    def close(self) -> None:
        if self.chardev is not None:
            self.chardev.close()

    def reset(self) -> None:
        self.enabled = self.fifo_bits = self.errors = 0
        self.empty_pending = False
        self.divisor = 1
        self.out = bytearray()

    async def run(self) -> None:
        if self.chardev is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.chardev.run)
            nursery.start_soon(self._send, self.chardev)
            while True:
                while self.wire:  # of before a reset, too: the host waits until the driver has taken what there is
                    await self._news.wait()
                self.receive(await self.chardev.receive())

    async def _send(self, chardev: Chardev) -> None:
        while True:
            while self.out:
                out = self.out  # another one after a reset
                taken = bytes(out)
                await chardev.send(taken)
                del out[: len(taken)]
                self.empty_pending = not self.out
                self._update()
            await self._news.wait()

    def receive(self, data: bytes) -> None:
        """Bytes that come over the wire; they wait until the driver takes them."""
        self.wire.extend(data)
        self._update()

    def _loop(self, byte: int) -> None:
        # Not more than the FIFO has room for: the driver's own bytes must not fill our memory.
        if len(self.wire) < FIFO:
            self.wire.append(byte)
        else:
            self.errors |= OVERRUN

    def _cause(self) -> int:
        """The most important interrupt, as the identification register has it; 1 for none."""
        if self.enabled & LINE and self.errors:
            return 0x06
        if self.enabled & RECEIVED and self.wire:
            return 0x04
        if self.enabled & EMPTY and self.empty_pending:
            return 0x02
        if self.enabled & MODEM and self.modem_status.value & 0x0F:
            return 0x00
        return 0x01

    def _update(self) -> None:
        self._news.set()
        self._news = trio.Event()
        self.irq[0].set(self._cause() != 0x01)

    # Ports

    @data.on_read
    def data_read(self) -> int:
        if self.line_control.divisor_latch:
            return self.divisor & 0xFF
        byte = self.wire.popleft() if self.wire else 0
        self._update()
        return byte

    @data.on_write
    def data_written(self, value: int) -> None:
        if self.line_control.divisor_latch:
            self.divisor = self.divisor & 0xFF00 | value
            return
        if self.modem_control.loop or self.chardev is None:
            self._loop(value)
            self.empty_pending = True
        else:
            self.empty_pending = False
            if len(self.out) < FIFO:  # the driver has not looked, and what it writes is lost
                self.out.append(value)
        self._update()

    @enable.on_read
    def enable_read(self) -> int:
        return self.divisor >> 8 if self.line_control.divisor_latch else self.enabled

    @enable.on_write
    def enable_written(self, value: int) -> None:
        if self.line_control.divisor_latch:
            self.divisor = self.divisor & 0xFF | value << 8
            return
        if value & EMPTY and not self.enabled & EMPTY:
            self.empty_pending = not self.out
        self.enabled = value & 0x0F
        self._update()

    @ident.on_read
    def ident_read(self) -> int:
        cause = self._cause()
        if cause == 0x02:
            self.empty_pending = False  # reading it acknowledges it
            self._update()
        return cause | self.fifo_bits

    @ident.on_write
    def fifo_control_written(self, value: int) -> None:
        self.fifo_bits = 0xC0 if value & 1 else 0
        if value & 2:
            for _ in range(min(FIFO, len(self.wire))):
                self.wire.popleft()
        self._update()

    @modem_control.on_write
    def modem_control_written(self, value: int) -> None:
        lines = LINES_UP
        if self.modem_control.loop:
            lines = (value & 2) << 3 | (value & 1) << 5 | (value & 4) << 4 | (value & 8) << 4
        changed = lines ^ self.modem_status.value & 0xF0
        self.modem_status.value = lines | self.modem_status.value & 0x0F | changed >> 4
        self._update()

    @line_status.on_read
    def line_status_read(self) -> int:
        status = (0 if self.out else TRANSMITTER_IDLE) | self.errors | (1 if self.wire else 0)
        self.errors = 0
        self._update()
        return status

    @modem_status.on_read
    def modem_status_read(self) -> int:
        status = self.modem_status.value
        self.modem_status.value = status & 0xF0  # each change is told once
        self._update()
        return status


if __name__ == "__main__":
    main(Uart)
