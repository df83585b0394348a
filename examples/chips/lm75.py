"""Digital temperature sensor LM75B with thermal watchdog, on I²C.

Facts: Texas Instruments, LM75B/LM75C data sheet SNIS153B, pages 9 to 12: temperature data format, pointer and data
registers, power-up defaults. The output O.S. is that of comparator mode with a fault queue of one, as after power-up.
"""

TEMPERATURE, CONFIGURATION, T_HYST, T_OS = range(4)
"""Pointer register: which register the next bytes are of."""
SHUTDOWN = 0x01


class Lm75:
    """Set ``celsius``; the chip measures it, unless it is shut down."""

    def __init__(self, celsius: float = 25.0) -> None:
        self.celsius = celsius
        self.pointer = TEMPERATURE
        self.configuration = 0
        self.limits = {T_HYST: 75.0, T_OS: 80.0}
        self.over = False
        """Whether the output O.S. is active."""
        self._measured = celsius
        self._written: list[int] | None = None
        self._bytes_out = 0

    def measure(self) -> None:
        """One conversion. Here each read from the bus is preceded by one, and one takes no time."""
        if self.configuration & SHUTDOWN:
            return
        self._measured = min(125.0, max(-55.0, self.celsius))
        if self._measured >= self.limits[T_OS]:
            self.over = True
        elif self._measured < self.limits[T_HYST]:
            self.over = False

    # On the bus

    def start(self, *, reading: bool) -> None:
        self._written = None if reading else []
        self._bytes_out = 0
        if reading:
            self.measure()

    def write(self, byte: int) -> bool:
        assert self._written is not None
        self._written.append(byte)
        if len(self._written) == 1:
            self.pointer = byte & 3
        elif self.pointer == CONFIGURATION:
            self.configuration = byte & 0x1F
        elif self.pointer in self.limits and len(self._written) == 3:
            self.limits[self.pointer] = _celsius(*self._written[1:])
        return True

    def read(self) -> int:
        if self.pointer == CONFIGURATION:
            return self.configuration
        value = self._measured if self.pointer == TEMPERATURE else self.limits[self.pointer]
        byte = _register(value)[self._bytes_out % 2]
        self._bytes_out += 1
        return byte

    def stop(self) -> None:
        self._written = None


def _register(celsius: float) -> bytes:
    """Nine bits of two's complement in halves of a degree, at the upper end of two bytes."""
    return (round(celsius * 2) << 7).to_bytes(2, "big", signed=True)


def _celsius(high: int, low: int) -> float:
    return (int.from_bytes(bytes([high, low]), "big", signed=True) >> 7) / 2
