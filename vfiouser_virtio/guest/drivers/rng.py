"""Driver for the entropy device (virtio 1.4, 5.4)."""

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.protocols.virtio.rng import DEVICE_ID

MAX_REQUEST = 4096
"""Bytes of one buffer."""


class Entropy:
    """Source of random bytes: ``driver_data`` of its device."""

    def __init__(self, device: VirtioDevice, queue: RequestQueue) -> None:
        self.device = device
        self.queue = queue

    async def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes, however many buffers that takes."""
        data = b""
        while len(data) < count:
            data += await self.read_some(min(count - len(data), MAX_REQUEST))
        return data

    async def read_some(self, count: int) -> bytes:
        """What the device puts into one buffer of ``count`` bytes: at least one.

        Raises DeviceBroken when it is none: "The device MUST place one or more random bytes into the buffer" (5.4.6.2).
        """
        written, [data] = await self.queue.request([], [count])
        if not written:
            raise DeviceBroken(f"{self.device.name}: no random byte in a buffer of {count}", "5.4.6.2")
        return data[:written]


class EntropyDriver(VirtioDriver):
    """Driver that makes an `Entropy` of each device."""

    name = "virtio_rng"
    id_table = virtio_ids(DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(0)
        device.driver_data = Entropy(device, await RequestQueue.open(device, "requestq"))

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.queue.close()


DRIVER = EntropyDriver
