"""Driver for the input device (virtio 1.4, 5.8): its description, events, and the statusq for lights and sounds."""

from dataclasses import dataclass, field

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.drivers.console import Inbox
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.protocols.virtio import input as wire
from vfiouser_virtio.protocols.virtio.input import DEVICE_ID, EVENT_CODEC, Ev, Select, Syn

BUFFERS = 64


@dataclass
class Description:
    """Description of an input device, from its configuration."""

    name: str = ""
    serial: str = ""
    ids: tuple[int, ...] = ()
    """Bus type, vendor, product and version."""
    properties: set[int] = field(default_factory=set)
    codes: dict[int, set[int]] = field(default_factory=dict)
    """By event type."""
    axes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each absolute axis: min, max, fuzz, flat, res."""


class InputEvents:
    """Events of an input device: ``driver_data`` of it."""

    def __init__(self, device: VirtioDevice, events: Inbox, status: RequestQueue) -> None:
        self.device = device
        self.events = events
        self.status = status

    async def describe(self) -> Description:
        """All that the configuration has."""
        found = Description(
            name=(await self.select(Select.ID_NAME)).decode(),
            serial=(await self.select(Select.ID_SERIAL)).decode(),
            properties=_bits(await self.select(Select.PROP_BITS)),
        )
        if ids := await self.select(Select.ID_DEVIDS):
            found.ids = wire.DEVIDS_CODEC.unpack(ids)
        for kind in range(wire.MAX_TYPE + 1):
            if bits := await self.select(Select.EV_BITS, kind):
                found.codes[kind] = _bits(bits)
        for axis in found.codes.get(Ev.ABS, ()):
            found.axes[axis] = wire.ABSINFO_CODEC.unpack(await self.select(Select.ABS_INFO, axis))
        return found

    async def select(self, select: int, subsel: int = 0) -> bytes:
        """What the device has for this; empty where it has nothing. Raises DeviceBroken for a size that cannot be."""
        config = self.device.config
        await config.set("select", select)
        await config.set("subsel", subsel)
        size = await config.get_int("size")
        if size > wire.MAX_DATA:
            raise DeviceBroken(f"{self.device.name}: size {size} in its configuration, of {wire.MAX_DATA}", "5.8.4")
        data = await config.get("data")
        assert isinstance(data, bytes)
        return data[:size]

    async def receive(self) -> tuple[int, int, int]:
        """The next event: type, code, value. Raises DeviceBroken for a buffer without one."""
        while (data := self.events.take()) is None:
            await self.device.wait(self.events.arrived)
        if len(data) != EVENT_CODEC.size:
            raise DeviceBroken(f"{self.device.name}: {len(data)} bytes in a buffer are no event", "5.8.6")
        kind, code, value = EVENT_CODEC.unpack(data)
        return kind, code, value

    async def frame(self) -> list[tuple[int, int, int]]:
        """The events until the next SYN_REPORT, without that."""
        found = []
        while (event := await self.receive()) != (Ev.SYN, Syn.REPORT, 0):
            found.append(event)
        return found

    async def tell(self, kind: int, code: int, value: int) -> None:
        """A light or a sound; returns when the device has taken it."""
        await self.status.request([EVENT_CODEC.pack(kind, code, value)])


class InputDriver(VirtioDriver):
    """Driver that makes an `InputEvents` of each device."""

    name = "virtio_input"
    id_table = virtio_ids(DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(0)
        events = Inbox(device, BUFFERS, EVENT_CODEC.size)
        await events.open("eventq")
        device.driver_data = InputEvents(device, events, await RequestQueue.open(device, "statusq"))
        await device.ready()
        events.kick()

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.events.close()
        device.driver_data.status.close()


def _bits(data: bytes) -> set[int]:
    return {bit for bit in range(8 * len(data)) if data[bit // 8] >> bit % 8 & 1}


DRIVER = InputDriver
