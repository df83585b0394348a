"""The point of 2007: one bus, one driver, devices of one class behind transports that know nothing of each other."""

from contextlib import AsyncExitStack

import pytest
import trio
from support.serving import serving_functions

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import BlkDriver, Disk, EntropyDriver, PciTransport, VirtioBus, VirtioPciDriver
from vfiouser_virtio.transports import Loopback, VirtioPci
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.vfio_user import SharedMemory, connect


@pytest.mark.parametrize("ids", ["default", "2007", "qemu"])
async def test_pci_and_loopback_on_one_bus_with_one_driver(ids: Style) -> None:
    """Real socket, server and client on one side, nothing at all on the other; all in this process."""
    bus, driver = VirtioBus(), BlkDriver()
    await bus.register_virtio_driver(driver)
    with trio.fail_after(60), SharedMemory(4 << 20) as ram:
        async with AsyncExitStack() as stack:
            functions = await stack.enter_async_context(
                serving_functions(VirtioPci(Blk(size=1 << 20, serial="pci"), ids=ids))
            )
            path = functions[0]["socket"]["path"]
            port = await stack.enter_async_context(connect(path, memory=[ram]))
            pci = await stack.enter_async_context(VirtioPciDriver(bus))
            loopback = await stack.enter_async_context(Loopback(Blk(size=2 << 20, serial="loopback"), ids=ids))

            on_pci = await pci.probe(port)
            in_process = await bus.add_device(loopback)

            assert bus.devices == [on_pci, in_process]
            assert on_pci.driver is in_process.driver is driver
            assert isinstance(on_pci.transport, PciTransport)
            assert isinstance(in_process.transport, Loopback)
            for name in ("vendor", "device", "subsystem_vendor", "subsystem", "class_code", "virtio_id"):
                assert getattr(on_pci.ids, name) == getattr(in_process.ids, name)
            assert on_pci.features == in_process.features

            # The same driver object's code, on both at a time; each disk keeps what is its own.
            async def use(disk: Disk, serial: bytes, sectors: int) -> None:
                assert await disk.get_id() == serial
                assert await disk.capacity() == sectors
                await disk.write(5, serial.ljust(512, b"."))
                for _ in range(50):
                    assert await disk.read(5, 1) == serial.ljust(512, b".")
                await disk.flush()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, on_pci.driver_data, b"pci", 2048)
                nursery.start_soon(use, in_process.driver_data, b"loopback", 4096)

            # Without its driver each is just a device again; with it, it works as before.
            await bus.unregister_virtio_driver(driver)
            assert [device.driver for device in bus.devices] == [None, None]
            assert [await device.read_status() for device in bus.devices] == [0, 0]
            await bus.register_virtio_driver(driver)
            for device in bus.devices:
                assert (await device.driver_data.read(5, 1)).rstrip(b".") in (b"pci", b"loopback")
            await bus.remove_device(in_process)
        assert bus.devices == []


async def test_each_type_finds_its_own_driver() -> None:
    bus = VirtioBus()
    drivers = [EntropyDriver(), BlkDriver()]
    for driver in drivers:
        await bus.register_virtio_driver(driver)
    with trio.fail_after(60):
        async with Loopback(Blk(size=1 << 20)) as disk, Loopback(Rng()) as source:
            devices = [await bus.add_device(transport) for transport in (disk, source)]
            assert [device.driver for device in devices] == drivers[::-1]
            assert len(await devices[0].driver_data.read(0, 1)) == 512
            assert len(await devices[1].driver_data.read(100)) == 100
