"""Console device (virtio 1.4, 5.3): configuration and control messages; names of linux/virtio_console.h."""

from enum import IntEnum

from construct import Int16ul, Int32ul, Struct

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, Exercise, RequestShape, no_complaint
from vfiouser_virtio.protocols.virtio.features import FeatureBit
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.CONSOLE


class ConsoleFeature(FeatureBit):
    """Feature bits of the device type, by number (5.3.3)."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2


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
CONTROL_CODEC, RESIZE_CODEC = codec(CONTROL), codec(RESIZE)

TYPE = DeviceType(
    "console",
    CONFIG,
    ConsoleFeature,
    queues=("receiveq0", "transmitq0", "control_receiveq", "control_transmitq"),
    more=("receiveq", "transmitq"),
    device_id=DEVICE_ID,
    device_fills=("receiveq0", "control_receiveq", "receiveq"),
    queue_features=dict.fromkeys(
        ("control_receiveq", "control_transmitq", "receiveq", "transmitq"), ConsoleFeature.MULTIPORT
    ),
    pci_class=0x078000,
    linux_modules=("virtio_console",),
    exercise=Exercise("console", 1, b"virtio conformance\r\n", 0, no_complaint),
    requests=(
        RequestShape(queues=(0, 2, 4), payload=(0, 0, 0, 0, 1), writable=(1, 8, 64, 4096), weight=3),
        RequestShape(
            queues=(3,),
            header=CONTROL.subcon,
            usual={"id": (0, 1, 2), "event": tuple(Event), "value": (0, 1)},
            writable=(0, 0, 0, 0, 8),
        ),
        RequestShape(queues=(1, 5), payload=(1, 16, 100, 5000), writable=(0, 0, 0, 0, 8), weight=2),
    ),
)
