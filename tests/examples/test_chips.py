"""Chips of examples/chips on their buses, against numbers of their data sheets."""

import pytest
from chips.at24 import At24
from chips.bmp280 import CONFIG, CTRL_MEAS, ID, PRESS, RESET, TEMP, TRIMMING, Bmp280, fine_temperature, pressure
from chips.buses import I2cBus, spi_transfer
from chips.lm75 import CONFIGURATION, SHUTDOWN, T_HYST, T_OS, TEMPERATURE, Lm75


def bus_with(chip: Lm75 | At24 | Bmp280) -> I2cBus:
    return I2cBus({0x48: chip})


# The bus


def test_an_address_without_a_chip_is_not_acknowledged() -> None:
    bus = bus_with(At24())
    assert bus.transfer(0x49, b"", 0) is None
    assert bus.transfer(0x48, b"", 0) == b""


@pytest.mark.parametrize("address", [0x00, 0x07, 0x78, 0x148])
def test_reserved_addresses_are_refused(address: int) -> None:
    with pytest.raises(ValueError, match=f"{address:#x} is none of 0x08 to 0x77"):
        I2cBus({address: At24()})


# LM75

# SNIS153B, temperature data format.
TEMPERATURES = [(125, 0x0FA), (25, 0x032), (0.5, 0x001), (0, 0x000), (-0.5, 0x1FF), (-25, 0x1CE), (-55, 0x192)]


@pytest.mark.parametrize(("celsius", "output"), TEMPERATURES)
def test_lm75_temperature(celsius: float, output: int) -> None:
    assert bus_with(Lm75(celsius)).transfer(0x48, bytes([TEMPERATURE]), 2) == (output << 7).to_bytes(2, "big")


def test_lm75_pointer_stays_for_the_next_read() -> None:
    bus = bus_with(Lm75())
    bus.transfer(0x48, bytes([T_OS]), 0)
    assert bus.transfer(0x48, b"", 2) == bytes([80, 0])
    assert bus.transfer(0x48, bytes([T_HYST]), 2) == bytes([75, 0])


def test_lm75_limits_switch_the_output_with_hysteresis() -> None:
    chip = Lm75(49.0)
    bus = bus_with(chip)
    bus.transfer(0x48, bytes([T_OS, 50, 0x80]), 0)
    bus.transfer(0x48, bytes([T_HYST, 45, 0]), 0)
    assert bus.transfer(0x48, bytes([T_OS]), 2) == bytes([50, 0x80])
    for celsius, over in ((50.0, False), (50.5, True), (45.0, True), (44.5, False)):
        chip.celsius = celsius
        bus.transfer(0x48, bytes([TEMPERATURE]), 2)
        assert chip.over is over, celsius


def test_lm75_shut_down_keeps_its_last_temperature() -> None:
    chip = Lm75(20.0)
    bus = bus_with(chip)
    bus.transfer(0x48, bytes([CONFIGURATION, SHUTDOWN]), 0)
    chip.celsius = 30.0
    assert bus.transfer(0x48, bytes([TEMPERATURE]), 2) == bytes([20, 0])
    assert bus.transfer(0x48, bytes([CONFIGURATION]), 1) == bytes([SHUTDOWN])
    bus.transfer(0x48, bytes([CONFIGURATION, 0]), 0)
    assert bus.transfer(0x48, bytes([TEMPERATURE]), 2) == bytes([30, 0])


# AT24


def test_eeprom_reads_go_on_and_roll_over() -> None:
    bus = bus_with(At24(bytes(range(256))))
    assert bus.transfer(0x48, bytes([0xFE]), 4) == bytes([0xFE, 0xFF, 0x00, 0x01])
    assert bus.transfer(0x48, b"", 2) == bytes([0x02, 0x03]), "current address read"


def test_eeprom_write_rolls_over_within_its_page() -> None:
    chip = At24()
    bus = bus_with(chip)
    bus.transfer(0x48, b"\x16ABCDEFGHIJ", 0)
    assert chip.memory[0x10:0x18] == b"CDEFGHIJ"
    assert chip.memory.count(0xFF) == 248


def test_eeprom_write_ends_with_stop_alone() -> None:
    chip = At24(b"old")
    assert bus_with(chip).transfer(0x48, b"\0new", 1) is not None
    assert chip.memory.startswith(b"old"), "a repeated START came instead"
    bus_with(chip).transfer(0x48, b"\0new", 0)
    assert chip.memory.startswith(b"new")


def test_eeprom_write_protected() -> None:
    chip = At24(b"old", write_protect=True)
    bus_with(chip).transfer(0x48, b"\0new", 0)
    assert chip.memory.startswith(b"old")


def test_eeprom_too_much_for_it() -> None:
    with pytest.raises(ValueError, match="256 bytes, not 257"):
        At24(bytes(257))


# BMP280

# The example of the data sheet, §3.12.
RAW_TEMPERATURE, RAW_PRESSURE = 519888, 415148
CELSIUS, PASCAL = 25.08, 100653.27


def test_bmp280_formulas() -> None:
    fine = fine_temperature(RAW_TEMPERATURE)
    assert fine / 5120 == pytest.approx(CELSIUS, abs=0.005)
    assert pressure(RAW_PRESSURE, fine) == pytest.approx(PASCAL, abs=0.01)


def results(data: bytes) -> tuple[int, int]:
    """Raw pressure and temperature."""
    return int.from_bytes(data[:3], "big") >> 4, int.from_bytes(data[3:], "big") >> 4


def test_bmp280_measures_what_is_there() -> None:
    chip = Bmp280(fine_temperature(RAW_TEMPERATURE) / 5120, PASCAL)
    bus = bus_with(chip)
    assert bus.transfer(0x48, bytes([ID]), 1) == b"\x58"
    assert bus.transfer(0x48, bytes([PRESS]), 6) == bytes([0x80, 0, 0] * 2), "nothing is measured yet"
    bus.transfer(0x48, bytes([CTRL_MEAS, 0b001_001_01]), 0)
    data = bus.transfer(0x48, bytes([PRESS]), 6)
    assert data is not None
    assert results(data) == pytest.approx((RAW_PRESSURE, RAW_TEMPERATURE), abs=1)
    assert bus.transfer(0x48, bytes([CTRL_MEAS]), 1) == bytes([0b001_001_00]), "asleep after a forced measurement"
    chip.celsius = 30.0
    assert bus.transfer(0x48, bytes([PRESS]), 6) == data


def test_bmp280_in_normal_mode_has_the_newest_and_skips_what_is_not_wanted() -> None:
    chip = Bmp280(0.0)
    bus = bus_with(chip)
    bus.transfer(0x48, bytes([CONFIG, 0x10, CTRL_MEAS, 0b010_000_11]), 0)  # two pairs in one transfer
    first = bus.transfer(0x48, bytes([PRESS]), 6)
    chip.celsius = 50.0
    second = bus.transfer(0x48, bytes([PRESS]), 6)
    assert first is not None
    assert second is not None
    assert results(first)[0] == results(second)[0] == 0x80000
    celsius = [fine_temperature(results(data)[1]) / 5120 for data in (first, second)]
    assert celsius == pytest.approx([0.0, 50.0], abs=0.001)
    assert bus.transfer(0x48, bytes([CONFIG]), 1) == b"\x10"


def test_bmp280_speaks_spi() -> None:
    chip = Bmp280()
    assert spi_transfer(chip, bytes([ID, 0xFF])) == b"\0\x58"
    # Bit 7 of a register's number is RW here: low writes.
    spi_transfer(chip, bytes([CTRL_MEAS & 0x7F, 0b001_001_11, CONFIG & 0x7F, 0x08]))
    assert spi_transfer(chip, bytes([CTRL_MEAS, 0, 0]))[1:] == bytes([0b001_001_11, 0x08])
    trimming = spi_transfer(chip, bytes([TRIMMING, 0, 0]))[1:]
    assert int.from_bytes(trimming, "little") == 27504
    assert results(spi_transfer(chip, bytes([PRESS, *range(6)]))[1:])[1] == pytest.approx(519000, abs=2000)


def test_bmp280_reset_word_and_no_other_resets() -> None:
    chip = Bmp280()
    bus = bus_with(chip)
    bus.transfer(0x48, bytes([CTRL_MEAS, 0xFF]), 0)
    bus.transfer(0x48, bytes([RESET, 0xB5, ID, 0x11]), 0)
    assert bus.transfer(0x48, bytes([CTRL_MEAS]), 1) == b"\xff"
    assert bus.transfer(0x48, bytes([ID]), 1) == b"\x58", "read only"
    bus.transfer(0x48, bytes([RESET, 0xB6]), 0)
    assert bus.transfer(0x48, bytes([CTRL_MEAS]), 1) == b"\0"
    assert bus.transfer(0x48, bytes([TEMP]), 3) == b"\x80\0\0"
