"""Ids, drivers and the bus: who gets which device, and when (2007)."""

import pytest

from vfiouser_virtio.guest import (
    ANY,
    DeviceBroken,
    FeaturesRefused,
    VirtioBus,
    VirtioDevice,
    VirtioDriver,
    VirtioId,
    VirtioPciDriver,
    new_vq,
    virtio_ids,
)
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.loopback import LoopbackIds
from vfiouser_virtio.virtio import Device, queue

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED = 1, 2, 4, 8, 128


class Echo(Device):
    device_id = 63
    requestq = queue(max_size=16)

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()


class EchoDriver(VirtioDriver):
    name = "echo"
    id_table = virtio_ids(63)

    def __init__(self) -> None:
        self.log: list[str] = []

    async def probe(self, device: VirtioDevice) -> None:
        self.log.append(f"probe {await device.read_status():#x}")
        await device.negotiate(0)
        device.driver_data = await new_vq(device, 0)

    async def remove(self, device: VirtioDevice) -> None:
        self.log.append(f"remove {await device.read_status():#x}")


def ids(style: Style = "default", number: int = 2) -> LoopbackIds:
    shown = identity(number, style)
    return LoopbackIds(
        shown.vendor, shown.device, shown.subsystem_vendor, shown.subsystem, shown.class_code, virtio_id=number
    )


# ---- id tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["default", "2007", "qemu"])
def test_a_virtio_type_in_every_identity(style: Style) -> None:
    matching = [number for number in range(1, 64) if any(row.matches(ids(style, number)) for row in virtio_ids(2))]
    assert matching == [2]


@pytest.mark.parametrize(
    ("row", "matches"),
    [
        (VirtioId(), True),
        (VirtioId(0x1AF4, 0x1042), True),
        (VirtioId(0x1AF4, 0x1043), False),
        (VirtioId(0x5000, 0x1042), False),
        (VirtioId(device=0x1042), True),
        (VirtioId(0x1AF4, 0x1042, 0x5000, 0x1042), True),
        (VirtioId(0x1AF4, 0x1042, 0x1AF4, ANY), False),
        (VirtioId(0x1AF4, 0x1042, ANY, 0x1100), False),
        # class << 8 under mask 0xffff00, as the id table of 2007 has it: the programming interface does not count
        (VirtioId(class_code=0x0180 << 8, class_mask=0xFFFF00), True),
        (VirtioId(class_code=0x0180FF, class_mask=0xFFFF00), True),
        (VirtioId(class_code=0x0100 << 8, class_mask=0xFFFF00), False),
        (VirtioId(class_code=0x010000, class_mask=0xFF0000), True),
        (VirtioId(0x1AF4, ANY, class_code=0x020000, class_mask=0xFFFFFF), False),
    ],
)
def test_rows(row: VirtioId, matches: bool) -> None:
    assert row.matches(ids()) is matches


def test_the_pci_driver_is_for_virtio_functions() -> None:
    pci = VirtioPciDriver(VirtioBus())

    def function(vendor: int, device: int) -> LoopbackIds:
        return LoopbackIds(vendor, device, 0, 0, 0, 0)

    for vendor in (0x1AF4, 0x5000):
        matching = [device for device in range(0x0F00, 0x1200) if pci.matches(function(vendor, device))]
        assert matching == list(range(0x1040, 0x1080))
    assert not pci.matches(function(0x8086, 0x1042))


# ---- the bus -------------------------------------------------------------------------------------------------------


async def test_a_device_that_finds_its_driver() -> None:
    bus, driver = VirtioBus(), EchoDriver()
    await bus.register_virtio_driver(driver)
    async with Loopback(Echo()) as transport:
        device = await bus.add_device(transport)
        assert device.driver is driver
        assert await device.read_status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        await bus.remove_device(device)
        assert await device.read_status() == 0
        left: tuple[object, ...] = (device.driver, device.driver_data, bus.devices)
        assert left == (None, None, [])
    assert driver.log == ["probe 0x3", "remove 0x0"]


async def test_a_driver_that_finds_its_devices() -> None:
    bus, driver = VirtioBus(), EchoDriver()
    async with Loopback(Echo()) as first, Loopback(Echo()) as second:
        devices = [await bus.add_device(transport) for transport in (first, second)]
        assert [device.driver for device in devices] == [None, None]
        await bus.register_virtio_driver(driver)
        assert [device.driver for device in devices] == [driver, driver]
        await bus.unregister_virtio_driver(driver)
        assert [device.driver for device in devices] == [None, None]
        assert bus.devices == devices
        assert await devices[0].read_status() == 0
        await bus.register_virtio_driver(driver)
        assert [device.driver for device in devices] == [driver, driver]


async def test_the_first_driver_that_matches() -> None:
    class Other(EchoDriver):
        id_table = (VirtioId(device=0x1041),)

    bus, drivers = VirtioBus(), [Other(), EchoDriver(), EchoDriver()]
    for driver in drivers:
        await bus.register_virtio_driver(driver)
    async with Loopback(Echo()) as transport:
        assert (await bus.add_device(transport)).driver is drivers[1]


async def test_two_buses_know_nothing_of_each_other() -> None:
    with_driver, without = VirtioBus(), VirtioBus()
    await with_driver.register_virtio_driver(EchoDriver())
    async with Loopback(Echo()) as transport:
        assert (await without.add_device(transport)).driver is None


async def test_a_probe_that_fails() -> None:
    class Failing(EchoDriver):
        async def probe(self, device: VirtioDevice) -> None:
            await super().probe(device)
            raise OSError("no")

    bus, driver = VirtioBus(), Failing()
    async with Loopback(Echo()) as first, Loopback(Echo()) as second:
        kept = await bus.add_device(first)
        with pytest.raises(OSError, match="no"):
            await bus.register_virtio_driver(driver)
        assert kept.driver is None
        assert await kept.read_status() & FAILED
        with pytest.raises(OSError, match="no"):
            await bus.add_device(second)
        assert bus.devices == [kept]
        # Another driver can still have it.
        await bus.unregister_virtio_driver(driver)
        await bus.register_virtio_driver(EchoDriver())
        assert kept.driver is not None
        assert await kept.read_status() & DRIVER_OK


async def test_several_probes_that_fail() -> None:
    class Failing(EchoDriver):
        async def probe(self, device: VirtioDevice) -> None:
            raise OSError(device.transport.name)

    bus = VirtioBus()
    async with Loopback(Echo(), name="a") as first, Loopback(Echo(), name="b") as second:
        await bus.add_device(first)
        await bus.add_device(second)
        with pytest.raises(ExceptionGroup, match="could not be bound to 2 devices"):
            await bus.register_virtio_driver(Failing())


# ---- features ------------------------------------------------------------------------------------------------------


async def test_the_mask_takes_features_away_but_never_version_1() -> None:
    bus = VirtioBus()
    await bus.register_virtio_driver(EchoDriver())
    async with Loopback(Echo()) as transport:
        device = await bus.add_device(transport, feature_mask=~(1 << 29))
        assert device.features == (1 << 28 | 1 << 32 | 1 << 40)
        assert not device.has_feature(29)
        await bus.remove_device(device)
        device = await bus.add_device(transport, feature_mask=0)
        assert device.features == 1 << 32


async def test_a_device_that_refuses() -> None:
    class Refusing(Echo):
        def features_ok(self) -> bool:
            return False

    async with Loopback(Refusing()) as transport:
        bus = VirtioBus()
        await bus.register_virtio_driver(EchoDriver())
        with pytest.raises(FeaturesRefused, match="refuses features 0x10130000000"):
            await bus.add_device(transport)


async def test_a_device_without_version_1() -> None:
    async with Loopback(Echo()) as transport:
        transport.core.device_features &= ~(1 << 32)
        bus = VirtioBus()
        await bus.register_virtio_driver(EchoDriver())
        with pytest.raises(DeviceBroken, match="VERSION_1 is missing") as caught:
            await bus.add_device(transport)
        assert caught.value.rule == "RB1"
