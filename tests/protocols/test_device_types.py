"""Names of queues and device types, against the specification's tables (5.2.2, 5.3.2, 5.4.2)."""

import pytest

from vfiouser_virtio.guest import DEVICE_TYPES, device_type
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.net import NetFeature


@pytest.mark.parametrize(
    ("kind", "index", "name"),
    [
        (DeviceId.RNG, 0, "requestq"),
        (DeviceId.BLOCK, 0, "requestq1"),
        (DeviceId.BLOCK, 63, "requestq64"),
        (DeviceId.CONSOLE, 0, "receiveq0"),
        (DeviceId.CONSOLE, 1, "transmitq0"),
        (DeviceId.CONSOLE, 2, "control_receiveq"),
        (DeviceId.CONSOLE, 3, "control_transmitq"),
        (DeviceId.CONSOLE, 4, "receiveq1"),
        (DeviceId.CONSOLE, 65, "transmitq31"),
    ],
)
def test_names_and_indexes(kind: DeviceId, index: int, name: str) -> None:
    assert device_type(kind).queue_name(index) == name
    assert device_type(kind).queue_index(name) == index


@pytest.mark.parametrize("name", ["requestq", "requestq0", "receiveq1", "", "requestq-1"])
def test_names_that_no_disk_has(name: str) -> None:
    with pytest.raises(LookupError, match=r"blk: no queue .* among requestq1…"):
        device_type(DeviceId.BLOCK).queue_index(name)


def test_types_that_nobody_described() -> None:
    assert device_type(DeviceId.P9).name == "p9"
    assert device_type(63).name == "type 63"
    assert device_type(63).queue_name(2) == "queue 2"
    with pytest.raises(LookupError, match="among none"):
        device_type(63).queue_index("requestq")


@pytest.mark.parametrize(
    ("sets", "index", "name"),
    [
        (1, 0, "receiveq1"),
        (1, 1, "transmitq1"),
        (1, 2, "controlq"),
        (4, 2, "receiveq2"),
        (4, 7, "transmitq4"),
        (4, 8, "controlq"),
        (None, 2, "receiveq2"),  # as far as is known
    ],
)
def test_the_last_queue_of_a_network_device_is_where_its_number_of_pairs_says(
    sets: int | None, index: int, name: str
) -> None:
    kind = device_type(DeviceId.NET)
    assert kind.queue_name(index, sets) == name
    assert kind.queue_index(name, sets) == index


def test_no_queue_comes_after_the_last_one() -> None:
    kind = device_type(DeviceId.NET)
    assert kind.queue_name(3, 1) == "queue 3"
    with pytest.raises(LookupError, match="no queue 'controlq' among receiveq1…, transmitq1…, controlq"):
        kind.queue_index("controlq")


def test_pairs_count_with_one_of_two_features_only() -> None:
    sets = device_type(DeviceId.NET).sets
    assert sets is not None
    assert sets.number(0, 8) == sets.number(NetFeature.CTRL_VQ.mask, 8) == 1
    assert sets.number(NetFeature.MQ.mask, 8) == sets.number(NetFeature.RSS.mask, 8) == 8


def test_which_queues_of_a_network_device_may_keep_their_buffers() -> None:
    keeps = device_type(DeviceId.NET).keeps_buffers
    control = NetFeature.CTRL_VQ.mask
    assert [keeps(index, control, 1) for index in range(5)] == [True, False, False, True, True]
    assert [keeps(index, control | NetFeature.MQ.mask, 2) for index in range(5)] == [True, False, True, False, False]
    assert keeps(2, 0, 1)  # there is no control queue


def test_every_described_type_is_one() -> None:
    assert DEVICE_TYPES[DeviceId.BALLOON].name == "balloon"  # whether it was looked up before or not
    assert set(DEVICE_TYPES) <= set(DeviceId)
    with pytest.raises(KeyError):
        DEVICE_TYPES[DeviceId.P9]
    assert DeviceId.P9 not in DEVICE_TYPES
