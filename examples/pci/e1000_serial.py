"""Chips beside an 82540EM's controller: its EEPROM, a 93C46 over Microwire, and its PHY, a Marvell 88E1011, over MDIO.

Facts: see e1000.py; EEPROM contents (§5.6), its access (§13.4.3, §13.4.4), PHY registers (§11.1), link (§8.6).
Microchip, 93C46 data sheet DS21749: instructions.
"""

from typing import ClassVar

from vfiouser_virtio.pci import Identity, Register, flag

CHECKSUM = 0xBABA
"""What all words of the EEPROM are together (§5.6.33)."""
WORDS = 64
READ, WRITE, ENABLE, DISABLE = "110", "101", "10011", "10000"
"""A start bit, and the instruction; there are nine bits with the address, or what is in its place. A word follows."""
INSTRUCTION = 9


class EepromWires(Register):
    """EECD: the four wires of the EEPROM, and who may use them."""

    clock = flag(0)
    chip_select = flag(1)
    data_in = flag(2)
    data_out = flag(3, access="ro")
    request = flag(6)
    grant = flag(7, access="ro")
    present = flag(8, access="ro")


class Eeprom:
    """93C46 with ``words``: takes a bit, and gives one, with each rising clock. What is written is there at once."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self._taken = ""
        self._clock = False
        self._out = True
        self._may_write = False

    def wires(self, chip_select: bool, clock: bool, data_in: bool) -> bool:
        """Set its three inputs; returns its output."""
        rises, self._clock = clock and not self._clock, clock
        if not chip_select:
            self._taken, self._out = "", True
        elif rises and (self._taken or data_in) and len(self._taken) < INSTRUCTION + 16:  # a one is the start
            self._taken += "1" if data_in else "0"
            self._out = self._next(self._taken, len(self._taken) - INSTRUCTION)
        return self._out

    def _next(self, taken: str, clocks: int) -> bool:
        """What comes out with a bit, so many clocks after an instruction: a zero, and the bits of the word."""
        if clocks == 0 and taken.startswith((ENABLE, DISABLE)):
            self._may_write = taken.startswith(ENABLE)
        address = int(taken[3:INSTRUCTION] or "0", 2)
        if clocks == 16 and taken.startswith(WRITE) and self._may_write:
            self.words[address] = int(taken[INSTRUCTION:], 2)
        return clocks > 0 and taken.startswith(READ) and bool(self.words[address] >> 16 - clocks & 1)

    @property
    def mac(self) -> bytes:
        """The address that a card takes from it."""
        return b"".join(word.to_bytes(2, "little") for word in self.words[:3])


def eeprom_words(mac: bytes, identity: Identity) -> list[int]:
    """What is in the EEPROM of a card with this address."""
    words = [0] * WORDS
    words[:3] = (int.from_bytes(mac[at : at + 2], "little") for at in (0, 2, 4))
    words[0x0A:0x10] = 0x4408, identity.subsystem, identity.subsystem_vendor, identity.device, identity.vendor, 0x3040
    words[WORDS - 1] = CHECKSUM - sum(words) & 0xFFFF
    return words


class Phy:
    """Registers of the PHY: its link is that of the netdev, always with 1000 Mbit/s, and negotiated at once."""

    RESET: ClassVar[dict[int, int]] = {
        0: 0x1140,
        2: 0x0141,
        3: 0x0C20,
        4: 0x0DE1,
        7: 0x2001,
        9: 0x0E00,
        15: 0x3000,
        16: 0x0068,
        20: 0x0D60,
    }
    READ_ONLY = (1, 2, 3, 5, 6, 10, 15, 17)
    LINK: ClassVar[dict[int, int]] = {1: 0x796D, 5: 0xCDE1, 6: 0x000F, 10: 0x7C00, 17: 0xAC00}
    """Status, abilities of the partner, expansion, 1000BASE-T status, specific status, while the link is up."""
    NO_LINK: ClassVar[dict[int, int]] = {1: 0x7949, 17: 0x8000}

    def __init__(self) -> None:
        self.registers = dict(self.RESET)

    @property
    def loopback(self) -> bool:
        """Whether what is sent comes back."""
        return bool(self.registers[0] & 0x4000)

    def read(self, number: int, link: bool) -> int:
        """A register, with or without a link."""
        return (self.LINK if link else self.NO_LINK).get(number, self.registers.get(number, 0))

    def write(self, number: int, value: int) -> None:
        """Set a register; control can reset all of them, and to negotiate again is over at once."""
        if number == 0 and value & 0x8000:
            self.registers = dict(self.RESET)
        elif number not in self.READ_ONLY:
            self.registers[number] = value & ~0x0200 if number == 0 else value
