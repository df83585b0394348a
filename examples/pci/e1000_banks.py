"""Registers of an 82540EM that come in groups: descriptor rings, addresses, statistics.

Facts: see e1000.py; rings (§13.4.25 to §13.4.43), receive addresses (§13.5.2, §13.5.3), statistics (§13.7).
"""

import trio

from vfiouser_virtio.pci import Bank, DmaFault, PciDevice, Register, array

STATISTICS = 0x4000
# Of these, by their offset.
MPC, RNBC, ROC, TORL, TOTL, TPR, TPT = 0x4010, 0x40A0, 0x40AC, 0x40C0, 0x40C8, 0x40D0, 0x40D4
PRC64, GPRC, BPRC, MPRC, GORCL = 0x405C, 0x4074, 0x4078, 0x407C, 0x4088
PTC64, GPTC, BPTC, MPTC, GOTCL = 0x40D8, 0x4080, 0x40F4, 0x40F0, 0x4090
TSCTC, TSCTFC = 0x40F8, 0x40FC
FCS = 4
"""Bytes of the check sequence, with which octets and sizes are counted."""


class Ring(Bank):
    """Ring of descriptors of 16 bytes: those from head to tail are the card's."""

    base = Register(0x00, width=64, writable=0xFFFF_FFFF_FFFF_FFF0)
    length = Register(0x08, writable=0xFFF80)
    head = Register(0x10, writable=0xFFFF)
    tail = Register(0x18, writable=0xFFFF)
    delay = Register(0x20)
    """RDTR, TIDV"""
    control = Register(0x28)
    absolute_delay = Register(0x2C)

    def __init__(self, device: PciDevice, index: int) -> None:
        super().__init__(device, index)
        self._kicked = trio.Event()

    @tail.on_write
    def kick(self) -> None:
        """There may be something to do."""
        self._kicked.set()

    async def wait_kick(self) -> None:
        """Wait for `kick`, since the last time."""
        await self._kicked.wait()
        self._kicked = trio.Event()

    @property
    def count(self) -> int:
        """Descriptors that there are."""
        return self.length.value // 16

    @property
    def left(self) -> int:
        """Descriptors that are the card's. Raises DmaFault where head or tail is outside of the ring."""
        count, head, tail = self.count, self.head.value, self.tail.value
        if head == tail:
            return 0
        if head >= count or tail >= count:
            raise DmaFault(f"head {head:#x}, tail {tail:#x} in a ring of {count:#x} descriptors")
        return (tail - head) % count

    @property
    def at_head(self) -> int:
        """Address of the descriptor at the head."""
        return self.base.value + 16 * self.head.value

    def advance(self, number: int = 1) -> None:
        """So many have become the driver's, which may have changed anything meanwhile."""
        self.head.value = (self.head.value + number) % max(self.count, 1)


class Address(Bank):
    """RAL, RAH: an address that the card takes frames for."""

    low = Register(0)
    high = Register(4)

    @low.on_write
    def low_written(self) -> None:
        self.device.receiver.addresses_changed()

    @high.on_write
    def high_written(self) -> None:
        self.device.receiver.addresses_changed()

    def set(self, mac: bytes) -> None:
        """What the EEPROM says."""
        self.low.value = int.from_bytes(mac[:4], "little")
        self.high.value = 1 << 31 | int.from_bytes(mac[4:], "little")

    @property
    def mac(self) -> bytes | None:
        """The address, if it is valid and meant as a destination."""
        high = self.high.value
        if not high >> 31 or high & 0x30000:
            return None
        return (self.low.value | (high & 0xFFFF) << 32).to_bytes(6, "little")


class Statistics(Bank):
    """Counters, which a driver clears by reading them."""

    counters = array(Register(0, access="rc"), count=64)

    def count(self, offset: int, number: int = 1) -> None:
        """Count; what is full stays so."""
        register = self.counters[(offset - STATISTICS) // 4]
        register.value = min(register.value + number, 0xFFFF_FFFF)

    def count_octets(self, offset: int, number: int) -> None:
        """Count in two registers of which the second is the upper half."""
        low, high = self.counters[(offset - STATISTICS) // 4 : (offset - STATISTICS) // 4 + 2]
        total = low.value + (high.value << 32) + number
        low.value, high.value = total & 0xFFFF_FFFF, total >> 32 & 0xFFFF_FFFF

    def sent(self, head: bytes, length: int) -> None:
        """A frame of ``length`` bytes, without FCS, that begins with ``head``."""
        self.count(TPT)
        self.count_octets(TOTL, length + FCS)
        self._good(head, length + FCS, GPTC, GOTCL, PTC64, BPTC, MPTC)

    def received(self, head: bytes, length: int) -> None:
        """The same in the other direction."""
        self._good(head, length + FCS, GPRC, GORCL, PRC64, BPRC, MPRC)

    def _good(self, head: bytes, length: int, frames: int, octets: int, sizes: int, broad: int, multi: int) -> None:
        self.count(frames)
        self.count_octets(octets, length)
        self.count(sizes + 4 * sum(length > limit for limit in (64, 127, 255, 511, 1023)))
        if head[:6] == b"\xff" * 6:
            self.count(broad)
        elif head[0] & 1:
            self.count(multi)
