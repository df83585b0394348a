"""Board of several files: the I²C controller of pci/ismt.py, and behind it chips of chips/.

In a guest: ``echo lm75 0x48 >/sys/bus/i2c/devices/i2c-N/new_device``, likewise ``24c02 0x50`` and ``bmp280 0x76``.
"""

from chips.at24 import At24
from chips.bmp280 import Bmp280
from chips.buses import I2cBus
from chips.lm75 import Lm75
from pci.ismt import Ismt

from vfiouser_virtio import main


class I2cBoard(Ismt):
    """Set the sensors' ``celsius`` and ``pascal``; what the EEPROM keeps is its ``memory``."""

    def __init__(self) -> None:
        self.thermometer = Lm75(21.5)
        self.eeprom = At24(b"vfiouser-virtio")
        self.barometer = Bmp280(23.0, 98765.0)
        super().__init__(I2cBus({0x48: self.thermometer, 0x50: self.eeprom, 0x76: self.barometer}))


if __name__ == "__main__":
    main(I2cBoard)
