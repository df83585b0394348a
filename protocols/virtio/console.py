"""The console device (virtio 1.4, 5.3): configuration and control messages; names of linux/virtio_console.h."""

from enum import IntEnum

from construct import Int16ul, Int32ul, Struct

from vfiouser_virtio.protocols.record import record


class Feature(IntEnum):
    """Feature bits of the device type, by number (5.3.3)."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2

    @property
    def mask(self) -> int:
        """The bit itself."""
        return 1 << self


class Event(IntEnum):
    """``event`` of a control message (5.3.6.2), whose text calls two of them DEVICE_ADD and DEVICE_REMOVE."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


# 5.3.4. virtio 1.4 put cols before rows also in its text; every implementation always had them in this order.
CONFIG = Struct("cols" / Int16ul, "rows" / Int16ul, "max_nr_ports" / Int32ul, "emerg_wr" / Int32ul)
Config = record(CONFIG)

# 5.3.6.2. PORT_NAME is followed by the name in UTF-8, without a NUL; RESIZE by the new size.
CONTROL = "virtio_console_control" / Struct("id" / Int32ul, "event" / Int16ul, "value" / Int16ul)
RESIZE = Struct("cols" / Int16ul, "rows" / Int16ul)
