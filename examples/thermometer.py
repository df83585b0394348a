"""A device type that is in no specification: a thermometer with configuration, and a driver for it in Python.

The device shows the temperature in its configuration and gives the driver one buffer, filled with a sample, for each
change. `test_thermometer.py` beside it runs both: `pytest examples/test_thermometer.py`.
"""

from math import inf

import trio
from construct import Int16ul, Int32ul, Struct

from vfiouser_virtio import Device, main, queue
from vfiouser_virtio.guest import DEVICE_TYPES, DeviceType, RequestQueue, VirtioDevice, VirtioDriver, virtio_ids
from vfiouser_virtio.protocols.record import record

DEVICE_ID = 62

# One description for both ends. Temperatures are tenths of a kelvin.
CONFIG = Struct("temperature" / Int16ul, "limit" / Int16ul)
SAMPLE = Struct("number" / Int32ul, "temperature" / Int16ul)
Config = record(CONFIG)


class Thermometer(Device):
    """The driver may write ``limit``; `change` refuses to go above it."""

    device_id = DEVICE_ID
    driver_writes = frozenset({"limit"})
    sampleq = queue(max_size=16)

    def __init__(self) -> None:
        super().__init__(config=Config(temperature=2930, limit=4000))
        self._send, self._receive = trio.open_memory_channel[int](inf)

    def change(self, temperature: int) -> None:
        """What happens on the host: another temperature, which the driver is told by a configuration interrupt."""
        temperature = min(temperature, int(self.config["limit"]))
        self.config.update(temperature=temperature)
        self._send.send_nowait(temperature)

    async def run(self) -> None:
        number = 0
        async for temperature in self._receive:
            chain = await anext(self.sampleq)
            chain.writable.write(SAMPLE.build({"number": number, "temperature": temperature}))
            chain.complete()
            number += 1


# For the driver's side: how the configuration is laid out, and what `probe` calls the queues.
DEVICE_TYPES[DEVICE_ID] = DeviceType("thermometer", CONFIG, queues=("sampleq",))


class ThermometerDriver(VirtioDriver):
    """``driver_data`` of its device is the queue of samples."""

    name = "thermometer"
    id_table = virtio_ids(DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(0)
        device.driver_data = await RequestQueue.open(device, 0)

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.close()


async def next_sample(device: VirtioDevice) -> tuple[int, int]:
    """Its number and the temperature; waits for a change."""
    answer = await device.driver_data.request([], [SAMPLE.sizeof()])
    sample = SAMPLE.parse(answer.data[0])
    return sample.number, sample.temperature


if __name__ == "__main__":
    main(Thermometer)
