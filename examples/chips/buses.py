"""Two-wire and four-wire buses between a controller and chips, one byte at a time as the wires carry them.

I²C: NXP UM10204, §3.1; SMBus is the same to these chips. SPI has no standard: mode, order of bits and the meaning of
the bytes are each chip's.
"""

from typing import Protocol


class I2cChip(Protocol):
    """Target on an I²C bus, from a START with its address to the next START or STOP."""

    def start(self, *, reading: bool) -> None:
        """Its address came after START; the controller will read, or write."""

    def write(self, byte: int) -> bool:
        """Byte from the controller; False is NACK."""
        ...

    def read(self) -> int:
        """Next byte for the controller, 0 to 255."""
        ...

    def stop(self) -> None:
        """End of the transfer: what was written takes effect now, if not before."""


class I2cBus:
    """Chips by their 7-bit address, and whole transfers to them."""

    def __init__(self, chips: dict[int, I2cChip]) -> None:
        """ValueError for an address that UM10204 §3.1.12 reserves, or that has more than 7 bits."""
        for address in chips:
            if not 0x08 <= address <= 0x77:
                raise ValueError(f"I²C address {address:#x} is none of 0x08 to 0x77")
        self.chips = chips

    def transfer(self, address: int, data: bytes, count: int) -> bytes | None:
        """Write ``data``, then read ``count`` bytes behind a repeated START; None where a byte was not acknowledged.

        Without ``data`` it is a read alone. With neither, only the address is sent: SMBus calls it a quick command.
        """
        chip = self.chips.get(address)
        if chip is None:
            return None
        try:
            if data or not count:
                chip.start(reading=False)
                for byte in data:
                    if not chip.write(byte):
                        return None
            if not count:
                return b""
            chip.start(reading=True)
            return bytes(chip.read() for _ in range(count))
        finally:
            chip.stop()


class SpiChip(Protocol):
    """Chip on an SPI bus, from its chip select going low to its going high."""

    def select(self) -> None:
        """Chip select went low."""

    def exchange(self, byte: int) -> int:
        """Byte that comes from the controller, and the one that the chip shifts out meanwhile."""
        ...

    def deselect(self) -> None:
        """Chip select went high."""


def spi_transfer(chip: SpiChip, data: bytes) -> bytes:
    """All of ``data`` under one chip select, and what came back."""
    chip.select()
    try:
        return bytes(chip.exchange(byte) for byte in data)
    finally:
        chip.deselect()
