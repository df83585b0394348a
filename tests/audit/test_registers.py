"""Each rule about registers is found broken by a driver that breaks it, and no other rule is.

A long file: one driver for each rule, of a few lines, and the table that names them.
"""

from collections.abc import Callable

import pytest
from support.audit_cases import CASES, breaks, check
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.devices.balloon import Balloon
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.balloon import BalloonFeature
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.raw.bring_up import DRIVER, DRIVER_OK, FEATURES_OK
from vfiouser_virtio.transports.pci import DEVICE, NOTIFY
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Device, Offer

# ---- status --------------------------------------------------------------------------------------------------------


@breaks("init/reset-first")
def _no_reset(driver: BadDriver) -> None:
    driver.acknowledge()


@breaks("init/acknowledge-first")
def _both_at_once(driver: BadDriver) -> None:
    driver.reset()
    driver.set("device_status", DRIVER)


@breaks("init/driver-first")
def _features_before_driver(driver: BadDriver) -> None:
    driver.reset()
    driver.set("device_status", 1)
    driver.accept(driver.offered())


@breaks("init/features-ok-first")
def _no_features_ok(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.accept(driver.offered())
    driver.set("device_status", DRIVER | 4)


@breaks("init/features-ok-read")
def _not_read(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.accept(driver.offered())
    driver.set("device_status", FEATURES_OK)
    driver.driver_ok()


class _Refuses(Device):
    device_id = 63

    def features_ok(self) -> bool:
        return False


@breaks("init/refused", lambda: (_Refuses(), Offer()))
def _goes_on(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.set("device_status", DRIVER | 4)


@breaks("init/queue-early")
def _queue_early(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.queue(0)


@breaks("init/config-write-early")
def _config_early(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.set_config(32, 1, 1)


@breaks("init/notify-early")
def _notify_early(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.queue(0)
    driver.notify(0)


@breaks("status/clear")
def _clear(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", DRIVER)


@breaks("status/failed")
def _after_failed(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.set("device_status", DRIVER | 128)
    driver.set("device_status", DRIVER | 4 | 128)


@breaks("status/reset-wait")
def _no_wait(driver: BadDriver) -> None:
    driver.set("device_status", 0)
    driver.acknowledge()


# ---- features ------------------------------------------------------------------------------------------------------


@breaks("features/unread")
def _unread(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.accept(Feature.VERSION_1.mask)


@breaks("features/unoffered")
def _unoffered(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate(more=Feature.RING_PACKED.mask)


@breaks("features/requires")
def _requires(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate(without=BlkFeature.FLUSH.mask)


class _Plain(Device):
    device_id = 63


class _OfferMore(Offer):
    bits = 0

    @property
    def features(self) -> int:
        return super().features | self.bits


def _offers(bits: int) -> Callable[[], tuple[Device, Offer]]:
    def set_up() -> tuple[Device, Offer]:
        offer = _OfferMore()
        object.__setattr__(offer, "bits", bits)  # frozen
        return _Plain(), offer

    return set_up


@breaks("features/unknown", _offers(1 << 44))
def _unknown(driver: BadDriver) -> None:
    driver.start(queues=())


@breaks("features/sr-iov", _offers(Feature.SR_IOV.mask))
def _sr_iov(driver: BadDriver) -> None:
    driver.start(queues=())


@breaks("features/late")
def _late(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate(without=BlkFeature.SEG_MAX.mask)
    driver.set("driver_feature_select", 0)
    driver.set("driver_feature", driver.features & 0xFFFF_FFFF | BlkFeature.SEG_MAX.mask)


@breaks("features/version-1")
def _no_version(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate(without=Feature.VERSION_1.mask)


def _leaves_out(feature: Feature) -> None:
    @breaks(f"features/{feature.name.lower().replace('_', '-')}", _offers(feature.mask))
    def _case(driver: BadDriver) -> None:
        driver.start(queues=(), without=feature.mask)


for _feature in (Feature.ACCESS_PLATFORM, Feature.RING_PACKED, Feature.ORDER_PLATFORM, Feature.NOTIF_CONFIG_DATA):
    _leaves_out(_feature)


# ---- common configuration -------------------------------------------------------------------------------------------


@breaks("common/width")
def _width(driver: BadDriver) -> None:
    driver.read(0x14, 4)


@breaks("common/read-only")
def _read_only(driver: BadDriver) -> None:
    driver.set("num_queues", 1)


@breaks("queue/size-zero", lambda: (Blk(size=1 << 20), Offer(packed=True)))
def _size_zero(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.set("queue_size", 0)


@breaks("queue/size-power-of-two")
def _size_power(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.set("queue_size", 12)


@breaks("queue/fields-first")
def _fields_first(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    desc, avail, _used = driver.place(0)
    driver.set("queue_desc", desc)
    driver.set("queue_driver", avail)
    driver.set("queue_enable", 1)


@breaks("queue/fields-late")
def _fields_late(driver: BadDriver) -> None:
    driver.start()
    driver.set("queue_size", 8)


@breaks("queue/enable-zero")
def _enable_zero(driver: BadDriver) -> None:
    driver.start()
    driver.set("queue_enable", 0)


@breaks("queue/enable-late")
def _enable_late(driver: BadDriver) -> None:
    driver.start()
    driver.queue(1)


def _unaligned(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    desc, area, device = driver.place(0)
    driver.set("queue_desc", desc)
    driver.set("queue_driver", area)
    driver.set("queue_device", device + 2)
    driver.set("queue_enable", 1)


breaks("queue/split-alignment")(_unaligned)
breaks("queue/packed-alignment", lambda: (Blk(size=1 << 20), Offer(packed=True)))(_unaligned)


@breaks("queue/used-flags")
def _used_flags(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    desc, area, device = driver.place(0)
    driver.ram.write(device, b"\1\0")
    driver.set("queue_desc", desc)
    driver.set("queue_driver", area)
    driver.set("queue_device", device)
    driver.set("queue_enable", 1)


@breaks("queue/reset-negotiated")
def _reset_negotiated(driver: BadDriver) -> None:
    driver.start(without=Feature.RING_RESET.mask)
    driver.set("queue_reset", 1)


@breaks("queue/reset-verify")
def _reset_verify(driver: BadDriver) -> None:
    driver.start()
    driver.set("queue_reset", 1)
    driver.queue(0)


# ---- interrupts, notifications --------------------------------------------------------------------------------------


@breaks("msix/range")
def _vector_range(driver: BadDriver) -> None:
    driver.reset()
    driver.set("config_msix_vector", 3)
    driver.get("config_msix_vector")


@breaks("msix/verify")
def _vector_verify(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.set("config_msix_vector", 0)
    driver.queue(0)
    driver.driver_ok()


@breaks("msix/isr")
def _isr(driver: BadDriver) -> None:
    driver.function.msix_enabled = True
    driver.start()
    driver.read_isr()


@breaks("notify/address")
def _address(driver: BadDriver) -> None:
    driver.start()
    driver.notify(2)


@breaks("notify/16-bit")
def _notify_width(driver: BadDriver) -> None:
    driver.start()
    driver.notify(0, size=4)


@breaks("notify/32-bit", lambda: (Blk(size=1 << 20), Offer(notification_data=True)))
def _notify_short(driver: BadDriver) -> None:
    driver.start()
    driver.notify(0)


@breaks("notify/index")
def _notify_index(driver: BadDriver) -> None:
    driver.start()
    driver.write(NOTIFY, b"\1\0")


@breaks("notify/config-data", lambda: (Blk(size=1 << 20), Offer(notif_config_data=True)))
def _notify_config_data(driver: BadDriver) -> None:
    driver.start()
    driver.notify(0)


@breaks("notify/next", lambda: (Blk(size=1 << 20), Offer(notification_data=True)))
def _notify_next(driver: BadDriver) -> None:
    driver.start()
    driver.write(NOTIFY, b"\0\0\x20\0")


# ---- suspend --------------------------------------------------------------------------------------------------------

_SUSPENDS = DRIVER_OK | 16


def _suspendable() -> tuple[Device, Offer]:
    return Blk(size=1 << 20), Offer(suspend=True, poll="off")


@breaks("suspend/early")
def _suspend_early(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", _SUSPENDS)


@breaks("suspend/verify", _suspendable)
async def _suspend_verify(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", _SUSPENDS)
    await driver.settle()
    driver.set("device_status", DRIVER_OK)


@breaks("suspend/notify", _suspendable)
async def _suspend_notify(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", _SUSPENDS)
    await driver.settle()
    driver.get("device_status")
    driver.notify(0)


@breaks("suspend/available", _suspendable)
async def _suspend_available(driver: BadDriver) -> None:
    driver.start()
    await suspend_and_resume(driver, meanwhile=1)


async def suspend_and_resume(driver: BadDriver, *, meanwhile: int) -> None:
    """With so many buffers made available in between; before it there is one that the device has not taken."""
    driver.add(0, [bytes(16)], [1])
    driver.set("device_status", _SUSPENDS)
    await driver.settle()
    driver.get("device_status")
    for _ in range(meanwhile):
        driver.add(0, [bytes(16)], [1])
    driver.set("device_status", DRIVER_OK)
    await driver.settle()
    driver.get("device_status")
    driver.notify(0)
    await driver.settle()


@breaks("suspend/config-write", _suspendable)
async def _suspend_config(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", _SUSPENDS)
    await driver.settle()
    driver.set_config(32, 1, 1)


@breaks("suspend/resume-wait", _suspendable)
async def _resume(driver: BadDriver) -> None:
    driver.start()
    driver.set("device_status", _SUSPENDS)
    await driver.settle()
    driver.get("device_status")
    driver.set("device_status", DRIVER_OK)
    driver.notify(0)


@pytest.mark.parametrize("meanwhile", [0, 1, 7])
@pytest.mark.parametrize("packed", [False, True])
async def test_buffers_of_a_suspended_device(packed: bool, meanwhile: int) -> None:
    async with bad_driver(Blk(size=1 << 20), Offer(suspend=True, packed=packed, poll="off")) as driver:
        driver.start()
        for _ in range(5):  # the ring's end comes in between
            await driver.request(0, [bytes(16)], [1])
        await suspend_and_resume(driver, meanwhile=meanwhile)
        assert set(driver.broken) == ({"suspend/available"} if meanwhile else set())


# ---- the device's configuration -------------------------------------------------------------------------------------


@breaks("config/width")
def _config_width(driver: BadDriver) -> None:
    driver.config(0, 8)


@breaks("config/optional")
def _optional(driver: BadDriver) -> None:
    driver.config(8, 4)


@breaks("config/generation")
def _generation(driver: BadDriver) -> None:
    driver.config(0, 4)
    driver.config(4, 4)


@breaks("config/write")
def _config_write(driver: BadDriver) -> None:
    driver.start()
    driver.set_config(0, 1, 4)


@breaks("input/config-write", lambda: (Input(), Offer()))
def _input_write(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))
    driver.set_config(2, 1, 1)


@breaks("net/config-write", lambda: (Net(), Offer()))
def _net_write(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))
    driver.set_config(0, 2, 1)


def _balloon() -> tuple[Device, Offer]:
    device = Balloon()
    device.features |= BalloonFeature.PAGE_POISON.mask
    return device, Offer(poll="off")


@breaks("balloon/poison-early", _balloon)
def _poison_early(driver: BadDriver) -> None:
    driver.start(queues=(0, 1))


@breaks("balloon/poison-late", _balloon)
def _poison_late(driver: BadDriver) -> None:
    driver.reset()
    driver.acknowledge()
    driver.negotiate()
    driver.set_config(12, 0xAA, 4)
    driver.driver_ok()
    driver.set_config(12, 0xBB, 4)


@breaks("blk/writeback-early")
def _writeback(driver: BadDriver) -> None:
    driver.reset()
    driver.config(32, 1)


# ---- PCI ------------------------------------------------------------------------------------------------------------


def _window(driver: BadDriver, bar: int, offset: int, length: int) -> None:
    at = _capability(driver, 5)
    for where, value, size in ((4, bar, 1), (8, offset, 4), (12, length, 4)):
        driver.function.region_write(PciRegion.CONFIG, at + where, value.to_bytes(size, "little"))
    driver.function.region_read(PciRegion.CONFIG, at + 16, 4)


def _capability(driver: BadDriver, kind: int) -> int:
    load = driver.function.config.load
    at = load(0x34, 1)
    while load(at, 1) != 9 or load(at + 3, 1) != kind:
        at = load(at + 1, 1)
    return at


@breaks("pci/capability-write")
def _capability_write(driver: BadDriver) -> None:
    driver.function.region_write(PciRegion.CONFIG, _capability(driver, 1) + 8, bytes(4))


@breaks("pci/window-aligned")
def _window_aligned(driver: BadDriver) -> None:
    _window(driver, 4, DEVICE + 2, 4)


@breaks("pci/window-range")
def _window_range(driver: BadDriver) -> None:
    _window(driver, 1, 0, 4)


async def test_config_space_may_be_read_after_a_reset_of_the_function() -> None:
    """Firmware has used the window; the window that is reset means nothing."""
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off")) as driver:
        _window(driver, 4, DEVICE, 4)
        driver.function.reset()
        for at in range(0, 256, 4):
            driver.function.region_read(PciRegion.CONFIG, at, 4)
        assert driver.broken == {}


RULES_HERE = [rule for rule, (case, _) in CASES.items() if case.__module__ == __name__]


@pytest.mark.parametrize("rule", RULES_HERE)
async def test_rule(rule: str) -> None:
    await check(rule)


@pytest.mark.parametrize("packed", [False, True])
async def test_a_good_driver_is_not_accused(packed: bool) -> None:
    async with bad_driver(Blk(size=1 << 20, num_queues=2), Offer(packed=packed, poll="off")) as driver:
        for _ in range(2):
            driver.start(queues=(0, 1))
            for number in range(40):
                await driver.request(number % 2, [bytes(16)], [512, 1])
            driver.get("config_generation")
            driver.config(0, 4)
            driver.config(4, 4)
            driver.get("config_generation")
            driver.set_config(32, 0, 1)
        assert not driver.broken
