"""What a device offers beside the features of its type, and what follows from the driver's choice."""

from typing import Any

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import ACKNOWLEDGE, DRIVER, FEATURES_OK, Driver
from vfiouser_virtio.virtio import Device, Offer, queue


class Sizes(Device):
    device_id = 63
    smallq = queue(max_size=8)
    largeq = queue(max_size=1024)


def negotiate(driver: Driver, features: int) -> None:
    core = driver.core
    core.write_status(ACKNOWLEDGE | DRIVER)
    for select in range(4):
        core.write_driver_features(select, features >> 32 * select & 0xFFFF_FFFF)
    core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert core.status & FEATURES_OK


@pytest.mark.parametrize(
    ("switch", "feature"),
    [
        ("packed", Feature.RING_PACKED),
        ("event_idx", Feature.EVENT_IDX),
        ("indirect_desc", Feature.INDIRECT_DESC),
        ("in_order", Feature.IN_ORDER),
        ("queue_reset", Feature.RING_RESET),
        ("notification_data", Feature.NOTIFICATION_DATA),
        ("notif_config_data", Feature.NOTIF_CONFIG_DATA),
        ("suspend", Feature.SUSPEND),
        ("iommu_platform", Feature.ACCESS_PLATFORM),
    ],
)
def test_each_switch_is_one_bit(switch: str, feature: Feature) -> None:
    on, off = (Offer(**dict[str, Any]({switch: state})) for state in (True, False))
    assert on.features ^ off.features == feature.mask
    assert on.features & off.features & Feature.VERSION_1.mask


@pytest.mark.parametrize("size", [-1, 0, 32769, 3, 12345])
def test_queue_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match=f"queue-size={size}"):
        Offer(queue_size=size)


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_every_queue_has_the_size_that_the_user_wants(size: int) -> None:
    driver = Driver(Sizes(), offer=Offer(queue_size=size))
    assert [each.size for each in driver.core.queues] == [size, size]


def test_a_split_queue_is_a_power_of_two() -> None:
    """CC8: until RING_PACKED is negotiated the register has a power of two, or 0."""
    driver = Driver(Sizes(), offer=Offer(packed=True, queue_size=300))
    smallq = driver.core.queues[0]
    assert smallq.size == 256
    assert [size for size in (0, 1, 3, 256, 257, 300, 512) if smallq.allows(size)] == [1, 256]
    negotiate(driver, Feature.VERSION_1.mask)
    assert smallq.size == 256
    driver.core.reset()
    negotiate(driver, Feature.VERSION_1.mask | Feature.RING_PACKED.mask)
    assert smallq.size == 300
    assert [size for size in (0, 1, 3, 256, 257, 300, 301, 512) if smallq.allows(size)] == [1, 3, 256, 257, 300]
    driver.core.reset_queue(0)
    assert smallq.size == 300
    driver.core.reset()
    assert smallq.size == 256


def test_a_size_that_was_chosen_early_stays() -> None:
    driver = Driver(Sizes(), offer=Offer(packed=True, queue_size=300))
    driver.core.queues[0].configure(size=64)
    negotiate(driver, Feature.VERSION_1.mask | Feature.RING_PACKED.mask)
    assert [each.size for each in driver.core.queues] == [64, 300]
