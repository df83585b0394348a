"""Pressure and temperature sensor BMP280, on I²C or SPI.

Facts: Bosch Sensortec, BMP280 data sheet BST-BMP280-DS001: memory map (§4.2), power modes (§3.6), transfers on I²C and
SPI (§5), trimming parameters and how a driver computes with them (§3.11); those of its example (§3.12) are this chip's.
"""

import struct
from collections.abc import Callable

TRIMMING, ID, RESET, STATUS, CTRL_MEAS, CONFIG, PRESS = 0x88, 0xD0, 0xE0, 0xF3, 0xF4, 0xF5, 0xF7
TEMP = 0xFA
CHIP_ID = 0x58
RESET_WORD = 0xB6
SKIPPED = 0x80000
"""Result of a measurement that ``ctrl_meas`` leaves out, 20 bits."""

DIG_T = (27504, 26435, -1000)
DIG_P = (36477, -10685, 3024, 2855, 140, -7, 15500, -14600, 6000)


def fine_temperature(raw: int) -> float:
    """Temperature as the formula for pressure takes it: 5120 to a degree Celsius."""
    t1, t2, t3 = DIG_T
    linear = raw / 16384 - t1 / 1024
    square = raw / 131072 - t1 / 8192
    return linear * t2 + square * square * t3


def pressure(raw: int, fine: float) -> float:
    """Pascal."""
    p1, p2, p3, p4, p5, p6, p7, p8, p9 = DIG_P
    half = fine / 2 - 64000
    offset = (half * half * p6 / 32768 + half * p5 * 2) / 4 + p4 * 65536
    slope = (1 + (p3 * half * half / 524288 + p2 * half) / 524288 / 32768) * p1
    value = (1048576 - raw - offset / 4096) * 6250 / slope
    return value + (p9 * value * value / 2147483648 + value * p8 / 32768 + p7) / 16


class Bmp280:
    """Set ``celsius`` and ``pascal``; a measurement turns them into what the sensor's converter would have given."""

    def __init__(self, celsius: float = 25.0, pascal: float = 101325.0) -> None:
        self.celsius = celsius
        self.pascal = pascal
        self.registers = bytearray(256)
        self.pointer = 0
        self._pointed = False
        self._command: int | None = None
        self.power_on()

    def power_on(self) -> None:
        """Registers after power-on or a soft reset."""
        self.registers[:] = bytes(256)
        struct.pack_into("<H2hH8h", self.registers, TRIMMING, *DIG_T, *DIG_P)
        self.registers[ID] = CHIP_ID
        self._store(PRESS, SKIPPED)
        self._store(TEMP, SKIPPED)

    def measure(self) -> None:
        """One measurement with the oversampling that was asked for; its time is none here, so STATUS stays 0."""
        control = self.registers[CTRL_MEAS]
        temperature = _search(fine_temperature, self.celsius * 5120)
        fine = fine_temperature(temperature)
        # More pressure is a smaller raw value.
        raw = _search(lambda candidate: -pressure(candidate, fine), -self.pascal)
        self._store(TEMP, temperature if control >> 5 else SKIPPED)
        self._store(PRESS, raw if control >> 2 & 7 else SKIPPED)

    def set_register(self, register: int, value: int) -> None:
        """What a write from either bus does; registers that cannot be written stay as they are."""
        if register == RESET and value == RESET_WORD:
            self.power_on()
        elif register == CONFIG:
            self.registers[CONFIG] = value & 0xFD
        elif register == CTRL_MEAS:
            self.registers[CTRL_MEAS] = value
            if value & 3 in (1, 2):  # forced: one measurement, then asleep again
                self.measure()
                self.registers[CTRL_MEAS] &= ~3

    def next_register(self) -> int:
        """What a read from either bus gives; the address goes on by one."""
        value = self.registers[self.pointer]
        self.pointer = (self.pointer + 1) % 256
        return value

    def _store(self, register: int, raw: int) -> None:
        self.registers[register : register + 3] = (raw << 4).to_bytes(3, "big")

    def _measure_always(self) -> None:
        if self.registers[CTRL_MEAS] & 3 == 3:  # normal mode: there is always a fresh one
            self.measure()

    # On I²C

    def start(self, *, reading: bool) -> None:
        self._pointed = False
        if reading:
            self._measure_always()

    def write(self, byte: int) -> bool:
        # Pairs of register and value (§5.2.1).
        if self._pointed:
            self.set_register(self.pointer, byte)
        else:
            self.pointer = byte
        self._pointed = not self._pointed
        return True

    def read(self) -> int:
        return self.next_register()

    def stop(self) -> None:
        self._pointed = False

    # On SPI: the first bit of the register's number is RW, and registers below 0x80 cannot be named (§5.3)

    def select(self) -> None:
        self._command = None
        self._measure_always()

    def exchange(self, byte: int) -> int:
        if self._command is None:
            self._command = byte
            self.pointer = byte | 0x80
            return 0
        if self._command & 0x80:
            return self.next_register()
        self.set_register(self._command | 0x80, byte)
        self._command = None  # pairs here, too
        return 0

    def deselect(self) -> None:
        self._command = None


def _search(value_of: Callable[[int], float], wanted: float) -> int:
    """Smallest of the 20-bit numbers whose value is at least the one that is wanted, or the largest."""
    low, high = 0, 0xFFFFF
    while low < high:
        middle = (low + high) // 2
        if value_of(middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low
