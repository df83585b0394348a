"""Intel SMBus Message Transport (iSMT), an I²C controller with a ring of descriptors in memory, for Linux' i2c-ismt.

Facts: Intel Atom Processor C2000 Product Family for Microserver, data sheet volume 2, 330061-002US, chapter 15: master
descriptors (§15.4.7.2, table 15-13), hardware-firmware flow (§15.4.7.4.3), interrupt cause logging (§15.5.4, table
15-23). SMBus 2.0: packet error code (§5.4). Only its side as a master is here, and time does not pass on its bus.

::

    MDBA ─▶ descriptor 0 │ 1 │ … │ MDS        16 bytes each:
                 ▲HMTP (ours)  ▲FMHP (driver)      control:  address+R/W, length or command, read length, flags
                                                   status:   flags, retries, bytes received, bytes sent   ◀─ ours
                                                   pointer:  buffer of what is sent, then of what is received
"""

from typing import Protocol

import trio

from vfiouser_virtio import main
from vfiouser_virtio.pci import Identity, PciDevice, Register, bar, field, flag, interrupts

MAX_READ = 240
"""Bytes that one transaction can read (§15.4.7.1)."""
MAX_BLOCK = 32
"""Bytes of a block that is written (SMBus 2.0, §5.5.7); the command is in front of them."""

# Flags of a descriptor: byte 3 of control, byte 0 of status.
COMMAND, BLOCK, PEC, INTERRUPT, STOP_ON_ERROR = 0x01, 0x04, 0x10, 0x40, 0x80
SUCCESS, NAK, CRC_ERROR, LARGE_PACKET = 0x01, 0x08, 0x10, 0x80
VALID = 1 << 31


class Bus(Protocol):
    """Chips behind the controller, such as `chips.buses.I2cBus`."""

    def transfer(self, address: int, data: bytes, count: int, /) -> bytes | None:
        """Write, then read ``count`` bytes; None where a byte was not acknowledged."""
        ...


class MasterControl(Register):
    start = flag(0)
    error_interrupts = flag(4)
    head = field(23, 16)
    """FMHP: the descriptor behind the last one that the driver has filled."""


class MasterStatus(Register):
    in_progress = flag(0, access="ro")
    errors = flag(4, access="w1c")
    """MEIS"""
    done = flag(5, access="w1c")
    """MIS"""
    tail = field(23, 16)
    """HMTP: the next descriptor that the controller takes."""


class DescriptorSize(Register):
    last = field(7, 0)
    """Number of descriptors in the ring, less one."""


class Ismt(PciDevice):
    """The controller; its ``bus`` has the chips."""

    identity = Identity(vendor=0x8086, device=0x1F15, class_code=0x0C0500)
    irq = interrupts(1, msi=True)

    regs = bar(0, size=0x400)
    general_control = Register(0x000, writable=0x4C)
    interrupt_log = Register(0x008, width=64)
    """SMTICL: address of three words, of which the first is for transactions of the master, the third for errors."""
    error_interrupt_mask = Register(0x010)
    error_aer_mask = Register(0x014)
    error_status = Register(0x018, access="w1c")
    error_info = Register(0x01C, access="ro")
    ring = Register(0x100, width=64)
    """MDBA"""
    control = MasterControl(0x108)
    status = MasterStatus(0x10C)
    size = DescriptorSize(0x110)
    retry_policy = Register(0x114)
    timing = Register(0x300, reset=0x4000_0000)
    """SPGT: 100 kHz"""

    def __init__(self, bus: Bus | None = None) -> None:
        super().__init__()
        self.bus = bus
        self._started = trio.Event()

    @general_control.on_write
    def general_control_written(self, value: int) -> None:
        self.general_control.value = 0
        if value & 0x40:
            self.soft_reset()

    @control.on_write
    def control_written(self, _value: int) -> None:
        if self.control.start:
            self._started.set()

    @status.on_write
    def status_written(self, _value: int) -> None:
        if not self.status.done and not self.status.errors:
            self.irq[0].clear()

    async def run(self) -> None:
        while True:
            await self._started.wait()
            self._started = trio.Event()
            # Not more than the ring holds: a driver can set a head that no tail ever comes to.
            for _ in range(self.size.last + 1):
                if not self.control.start or self.status.tail == self.control.head:
                    break
                self.status.in_progress = True
                good = await self._descriptor(self.ring.value + 16 * self.status.tail)
                self.status.in_progress = False
                if not good:
                    break
                await trio.lowlevel.checkpoint()  # other devices have their turns
            self.control.start = False

    async def _descriptor(self, address: int) -> bool:
        """One descriptor; whether the next may follow."""
        descriptor = await self.dma.read(address, 16)
        flags, pointer = descriptor[3], int.from_bytes(descriptor[8:16], "little")
        outcome, received, sent = await self._transaction(descriptor, pointer)
        await self.dma.write(address + 4, bytes([outcome, 0, received, sent]))
        if self.status.tail >= self.size.last:
            self.status.tail = 0
        else:
            self.status.tail += 1
        good = outcome == SUCCESS
        if good:
            self.status.done = True
        else:
            self.status.errors = True
        if self.interrupt_log.value:
            await self.dma.write(self.interrupt_log.value, (VALID | self.status.value & 0xFF0000).to_bytes(4, "little"))
        # A message comes when it is asked for; the wire interrupt always does, until it is acknowledged in MSTS.
        if flags & INTERRUPT or not good or not self.irq[0].by_message:
            self.irq[0].trigger()
        return good or not flags & STOP_ON_ERROR

    async def _transaction(self, descriptor: bytes, pointer: int) -> tuple[int, int, int]:
        """Outcome as flags of status, and the numbers of bytes received and sent."""
        target, length, count, flags = descriptor[:4]
        address = target >> 1
        data = b""
        if flags & BLOCK and not flags & COMMAND and length > MAX_BLOCK + 1:
            return LARGE_PACKET, 0, 0
        if flags & COMMAND:
            data = bytes([length])
        elif length:
            data = await self.dma.read(pointer, length)
            if flags & BLOCK:
                data = data[:1] + bytes([length - 1]) + data[1:]
        if count > MAX_READ:
            return LARGE_PACKET, 0, 0
        code = 1 if flags & PEC else 0
        head = bytes([address << 1]) + data if data else b""
        if code and not count:
            data += bytes([packet_error_code(head)])
        # A block begins with how many bytes follow; that number is stored, too.
        wanted = count + code + (1 if flags & BLOCK else 0) if count else 0
        answer = self.bus.transfer(address, data, wanted) if self.bus is not None else None
        if answer is None:
            return NAK, 0, 0
        if not count:
            return SUCCESS, 0, len(data)
        if flags & BLOCK:
            if not 0 < answer[0] <= count:
                return LARGE_PACKET, 0, len(data)
            answer = answer[: 1 + answer[0] + code]
        if code:
            head += bytes([address << 1 | 1])
            if packet_error_code(head + answer[:-1]) != answer[-1]:
                return CRC_ERROR, 0, len(data)
            answer = answer[:-1]
        await self.dma.write(pointer, answer)
        return SUCCESS, len(answer), len(data)


def packet_error_code(message: bytes) -> int:
    """CRC-8 with the polynomial x⁸+x²+x+1 over a whole message, addresses included."""
    crc = 0
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc


if __name__ == "__main__":
    main(Ismt)
