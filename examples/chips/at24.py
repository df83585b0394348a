"""EEPROM of 2 Kbit on I²C: 24LC02B, AT24C02 and the like.

Facts: Microchip, 24AA02/24LC02B/24FC02 data sheet DS20001709L: 256 bytes in pages of 8; writes take effect at STOP and
roll over within their page (§6.2), reads over the whole memory (§8.3); WP protects all of it (§6.3). The write cycle,
in which the chip acknowledges nothing (§7.0), takes no time here.
"""

SIZE = 256
PAGE = 8


class At24:
    """Contents are ``memory``; with ``write_protect``, the pin WP, they are read only."""

    def __init__(self, memory: bytes = b"", *, write_protect: bool = False) -> None:
        """``memory`` is what the chip has at first; the rest is erased (0xff). ValueError when it is too much."""
        if len(memory) > SIZE:
            raise ValueError(f"an AT24C02 has {SIZE} bytes, not {len(memory)}")
        self.memory = bytearray(memory.ljust(SIZE, b"\xff"))
        self.write_protect = write_protect
        self.address = 0
        self._page: dict[int, int] = {}
        self._addressed = False

    # On the bus

    def start(self, *, reading: bool) -> None:
        self._addressed = reading
        self._page.clear()  # a repeated START is no STOP: what was shifted in is not programmed

    def write(self, byte: int) -> bool:
        if not self._addressed:
            self.address, self._addressed = byte, True
            return True
        self._page[self.address] = byte
        self.address = self.address & ~(PAGE - 1) | (self.address + 1) & (PAGE - 1)
        return True

    def read(self) -> int:
        byte = self.memory[self.address]
        self.address = (self.address + 1) % SIZE
        return byte

    def stop(self) -> None:
        if not self.write_protect:
            for address, byte in self._page.items():
                self.memory[address] = byte
        self._page.clear()
