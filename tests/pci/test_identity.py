import dataclasses

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.pci import Identity

LIMITS = {"device": 16, "subsystem_vendor": 16, "subsystem": 16, "class_code": 24, "revision": 8}


@pytest.mark.parametrize(("field", "bits"), LIMITS.items())
def test_the_largest_value_of_each_field_fits_and_one_more_does_not(field: str, bits: int) -> None:
    good = Identity(1, 2)
    largest = (1 << bits) - 1
    assert getattr(dataclasses.replace(good, **{field: largest}), field) == largest
    with pytest.raises(ConfigError, match=f"{field} {largest + 1:#x} does not fit its {bits} bits"):
        dataclasses.replace(good, **{field: largest + 1})
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(good, **{field: -1})


def test_the_vendor_of_an_empty_slot_is_refused() -> None:
    assert Identity(0xFFFE, 0).vendor == 0xFFFE
    with pytest.raises(ConfigError, match="empty slot"):
        Identity(0xFFFF, 0)
