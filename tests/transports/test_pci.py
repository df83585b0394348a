"""The virtio-pci registers (virtio 1.4, 4.1), read and written as a protocol engine does for a client."""

import os

import pytest
from support.pci_guest import DEVICE_CFG, EXP_CAP, ISR, MSIX_CAP, NO_VECTOR, NOTIFY, PM_CAP, Echo, Guest

from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports import VirtioPci, identity
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Offer

# ---- what enumeration finds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "vendor", "subsystem_vendor", "subsystem", "class_code"),
    [
        ("default", 0x1AF4, 0x5000, 0x1042, 0x018000),
        ("2007", 0x5000, 0x5000, 0x1042, 0x018000),
        ("qemu", 0x1AF4, 0x1AF4, 0x1100, 0x010000),
    ],
)
def test_identity_styles(style: Style, vendor: int, subsystem_vendor: int, subsystem: int, class_code: int) -> None:
    guest = Guest(VirtioPci(Echo(), ids=style))
    assert (guest.config(0, 2), guest.config(2, 2)) == (vendor, 0x1042)
    assert (guest.config(0x2C, 2), guest.config(0x2E, 2)) == (subsystem_vendor, subsystem)
    assert guest.config(8, 4) == class_code << 8 | 1
    os.close(guest.ram)


def test_an_identity_for_every_device_id() -> None:
    for number in range(1, 64):
        assert identity(number).device == 0x1040 + number


def test_capabilities_and_layout(guest: Guest) -> None:
    assert [number for number, _ in guest.capabilities()] == [9, 9, 9, 9, 9, MSIX_CAP, PM_CAP, EXP_CAP]
    found = {kind: place[1:] for kind, place in guest.virtio_structures().items()}
    assert found == {1: (4, 0, 64), 3: (4, ISR, 1), 4: (4, DEVICE_CFG, 0x1000), 2: (4, NOTIFY, 0x1000), 5: (0, 0, 0)}
    for kind, length in ((1, 16), (2, 20), (3, 16), (4, 16), (5, 20)):
        assert guest.config(guest.virtio_structures()[kind][0] + 2, 1) == length
    assert guest.config(guest.virtio_structures()[2][0] + 16, 4) == 4  # notify_off_multiplier
    assert guest.function.region_info(4).size == 0x4000
    assert guest.function.region_info(1).size == 0x1000
    assert guest.config(0x20, 4) & 0xF == 0xC  # 64-bit, prefetchable


# ---- common configuration --------------------------------------------------------------------------------------------


def test_registers_after_reset(guest: Guest) -> None:
    expected = dict.fromkeys(COMMON_CFG_OFFSETS, 0)
    low = guest.function.core.device_features & 0xFFFF_FFFF
    expected |= {"device_feature": low, "num_queues": 2, "queue_size": 8}
    expected |= {"config_msix_vector": NO_VECTOR, "queue_msix_vector": NO_VECTOR}
    assert {name: guest.get(name) for name in COMMON_CFG_OFFSETS} == expected


def test_device_features_follow_any_select(guest: Guest) -> None:
    offered = guest.function.core.device_features
    for select, value in ((1, offered >> 32 & 0xFFFF_FFFF), (2, 1 << 4), (3, 0), (4, 0), (0xFFFF_FFFF, 0)):
        guest.set("device_feature_select", select)
        assert guest.get("device_feature") == value


def test_a_queue_that_does_not_exist_is_zeros(guest: Guest) -> None:
    guest.set("queue_select", 2)
    for name in ("queue_size", "queue_enable", "queue_desc", "queue_driver", "queue_device", "queue_reset"):
        guest.set(name, 1)
        assert guest.get(name) == 0
    assert guest.get("queue_msix_vector") == NO_VECTOR
    guest.set("queue_select", 1)
    assert (guest.get("queue_size"), guest.get("queue_notify_off")) == (16, 1)


@pytest.mark.parametrize("value", [0, 3, 16, 0xFFFF])
def test_queue_sizes_that_cannot_be(guest: Guest, value: int, caplog: pytest.LogCaptureFixture) -> None:
    guest.set("queue_size", value)
    assert guest.get("queue_size") == 8
    assert f"queue_size {value:#x}" in caplog.text
    guest.set("queue_size", 4)
    assert guest.get("queue_size") == 4


def test_queue_sizes_of_packed_queues(caplog: pytest.LogCaptureFixture) -> None:
    """CC8: until RING_PACKED is negotiated the register has a power of two; then any size is taken, and no larger."""
    guest = Guest(VirtioPci(Echo(), offer=Offer(packed=True, queue_size=300)))
    assert guest.get("queue_size") == 256
    guest.set("queue_size", 3)
    assert guest.get("queue_size") == 256
    assert "queue_size 0x3: no power of two up to 0x100" in caplog.text
    guest.negotiate()
    assert guest.get("queue_size") == 300
    for value, seen in ((301, 300), (0, 300), (3, 3), (299, 299)):
        guest.set("queue_size", value)
        assert guest.get("queue_size") == seen
    guest.set("device_status", 0)
    assert guest.get("queue_size") == 256
    guest.function.disconnected()
    os.close(guest.ram)


def test_vectors_beyond_the_table_read_back_as_no_vector(guest: Guest) -> None:
    for name in ("config_msix_vector", "queue_msix_vector"):
        for value, found in ((2, 2), (3, NO_VECTOR), (0, 0), (NO_VECTOR, NO_VECTOR)):
            guest.set(name, value)
            assert guest.get(name) == found
        guest.set(name, 1)
    guest.set("device_status", 0)
    assert guest.get("config_msix_vector") == guest.get("queue_msix_vector") == NO_VECTOR  # MX2


def test_an_enabled_queue_cannot_be_changed(guest: Guest) -> None:
    guest.negotiate()
    guest.enable(0)
    for name in ("queue_size", "queue_desc", "queue_driver", "queue_device"):
        before = guest.get(name)
        guest.set(name, 4)
        assert guest.get(name) == before
    guest.set("queue_enable", 0)
    assert guest.get("queue_enable") == 1


def test_any_width_has_a_defined_answer(guest: Guest) -> None:
    guest.set("device_feature_select", 1)
    guest.set("queue_desc", 0x1122_3344_5566_7788)
    whole = bytes(guest.function.region_read(PciRegion.BAR4, 0, 64))
    for offset in range(72):
        for size in (1, 2, 3, 4, 8):
            assert guest.read(offset, size) == int.from_bytes(whole[offset : offset + size], "little")
    assert guest.read(ISR - 4, 4) == guest.read(NOTIFY, 4) == guest.read(NOTIFY + 0xFFE, 2) == 0


def test_writes_change_whole_fields_only(guest: Guest) -> None:
    guest.write(0x20, 8, 0x1122_3344_5566_7788)
    guest.write(0x24, 4, 0xAABB_CCDD)
    assert guest.get("queue_desc") == 0xAABB_CCDD_5566_7788
    guest.write(0x20, 2, 0xFFFF)
    guest.write(0x21, 4, 0xFFFF_FFFF)
    assert guest.get("queue_desc") == 0xAABB_CCDD_5566_7788
    guest.write(0x16, 4, 0x0004_0001)  # queue_select and queue_size in one
    assert (guest.get("queue_select"), guest.get("queue_size")) == (1, 4)
    guest.write(0x3C, 8, (1 << 64) - 1)  # over the end


def test_only_a_read_of_the_generation_sees_the_change(guest: Guest) -> None:
    before = guest.get("config_generation")
    guest.function.device.config.update(value=5)
    guest.read(0x10, 4)
    assert guest.get("config_generation") != before
