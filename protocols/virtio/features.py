"""Device status and the feature bits that no device type owns (virtio 1.4, 2.1 and 6)."""

import functools
import operator
from collections.abc import Iterable
from enum import IntEnum, IntFlag


class DeviceStatus(IntFlag):
    """``device_status`` (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


class FeatureBit(IntEnum):
    """Base of the enumerations of feature bits: a bit's number, and its mask."""

    @property
    def mask(self) -> int:
        """The bit itself."""
        return 1 << self


def mask_of(features: Iterable[FeatureBit]) -> int:
    """Feature bits together, as a mask."""
    return functools.reduce(operator.or_, (feature.mask for feature in features), 0)


class Feature(FeatureBit):
    """Reserved feature bits, by number (6)."""

    NOTIFY_ON_EMPTY = 24
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43


def is_device_type_bit(bit: int) -> bool:
    """Whether a bit belongs to the device type (2.2): 0 to 23, 50 to 127."""
    return 0 <= bit <= 23 or 50 <= bit <= 127


# Bits that are offered and accepted are kept in a store of at least this many (the network device reaches bit 69).
FEATURE_BITS = 128
