"""Names of queues and device types, against the specification's tables (5.2.2, 5.3.2, 5.4.2)."""

import pytest

from vfiouser_virtio.guest import DEVICE_TYPES, device_type
from vfiouser_virtio.protocols.virtio.ids import DeviceId


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


def test_every_described_type_is_one() -> None:
    assert DEVICE_TYPES[DeviceId.BALLOON].name == "balloon"  # whether it was looked up before or not
    assert set(DEVICE_TYPES) <= set(DeviceId)
    with pytest.raises(KeyError):
        DEVICE_TYPES[DeviceId.P9]
    assert DeviceId.P9 not in DEVICE_TYPES
