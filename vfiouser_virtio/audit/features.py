"""Watch of feature negotiation (virtio 1.4, 2.2, 3.1.1 and 6)."""

from collections.abc import Callable, Iterable

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature, is_device_type_bit
from vfiouser_virtio.virtio.driver_activity import feature_names

_BITS = "2.2.1 Feature Bits"
_INIT = "3.1.1 Device Initialization"
_RESERVED = "6.1 Reserved Feature Bits"

UNREAD = must(
    "features/unread",
    _INIT,
    "The device's features are read before the driver writes the subset that it understands.",
    "bits accepted of a word of device_feature that was never read",
)
UNOFFERED = must("features/unoffered", _BITS, "Only features that are offered are accepted.", "bits at FEATURES_OK")
REQUIRES = must(
    "features/requires",
    _BITS,
    "No feature is accepted without those that it requires.",
    "bits at FEATURES_OK, and the prerequisites of the device's type",
)
UNKNOWN = must(
    "features/unknown",
    _BITS,
    "No feature is accepted that is reserved, or not described for the transport or the device type.",
    "bits at FEATURES_OK that the device offers, and that the specification does not have there",
)
LATE = must(
    "features/late", _INIT, "No feature is accepted after FEATURES_OK.", "new bits in driver_feature after FEATURES_OK"
)
VERSION_1 = must("features/version-1", _RESERVED, "VERSION_1 is accepted where it is offered.", "bits at FEATURES_OK")
SR_IOV = must(
    "features/sr-iov",
    _RESERVED,
    "SR_IOV is not accepted of a device without the capability of that name.",
    "bits at FEATURES_OK; no device of ours has that capability",
)
_SHOULD_ACCEPT = {
    feature: should(
        f"features/{feature.name.lower().replace('_', '-')}",
        _RESERVED,
        f"{feature.name} is accepted where it is offered.",
        "bits at FEATURES_OK",
    )
    for feature in (Feature.ACCESS_PLATFORM, Feature.RING_PACKED, Feature.ORDER_PLATFORM, Feature.NOTIF_CONFIG_DATA)
}

_LEGACY = {Feature.NOTIFY_ON_EMPTY, Feature.ANY_LAYOUT}


class FeatureWatch(Watch):
    """Watch of the feature words, and of what they are at FEATURES_OK."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._device_select = self._driver_select = 0
        self._read: set[int] = set()
        self._ever, self._always = 0, -1
        """Bits that were shown in a read at least, and in each: a device with faults shows what it does not offer."""

    def reset(self) -> None:
        """The selectors are 0 again; what a driver has read of a device does not change with a reset."""
        self._device_select = self._driver_select = 0

    def field_read(self, name: str, value: int) -> None:
        """Words beyond the 128 bits of any device say nothing."""
        if name == "device_feature" and self._device_select < 4:
            self._read.add(self._device_select)
            at = 32 * self._device_select
            self._ever |= value << at
            self._always &= value << at | ~(0xFFFF_FFFF << at)

    def field_written(self, name: str, value: int) -> None:
        """The features as a whole are looked at when FEATURES_OK is set."""
        core = self.core
        if name == "device_feature_select":
            self._device_select = value
        elif name == "driver_feature_select":
            self._driver_select = value
        elif name == "driver_feature":
            if value and self._driver_select < 4 and self._driver_select not in self._read:
                self.broke(UNREAD, f"accepted {value:#x} of word {self._driver_select}, which it has not read")
            if core.status & DeviceStatus.FEATURES_OK and self._driver_select < 4:
                new = value & ~core.read_driver_features(self._driver_select)
                if new:
                    self.broke(LATE, f"accepted {new:#x} of word {self._driver_select} after FEATURES_OK")
        elif name == "device_status" and not value:
            self.reset()
        elif name == "device_status" and value & DeviceStatus.FEATURES_OK & ~core.status:
            self._negotiated(core.driver_features, core.device_features | self._ever)

    def _negotiated(self, accepted: int, offered: int) -> None:
        bits = self.core.device.feature_bits

        def names(mask: int) -> str:
            return f"{feature_names(mask, bits)} ({mask:#x})"

        if alien := accepted & ~offered:
            self.broke(UNOFFERED, f"accepted {names(alien)}, not offered")
        wished = offered & self._always
        if wished & Feature.VERSION_1.mask and not accepted & Feature.VERSION_1.mask:
            self.broke(VERSION_1, f"accepted {names(accepted)}, without VERSION_1")
        accepted &= offered
        if accepted & Feature.SR_IOV.mask:
            self.broke(SR_IOV, "accepted SR_IOV")
        if unknown := accepted & ~self._known():
            self.broke(UNKNOWN, f"accepted {names(unknown)}")
        declared = device_type(self.core.device.device_id)
        for bit, one_of in declared.requires.items():
            if accepted >> bit & 1 and not any(accepted >> other & 1 for other in one_of):
                self.broke(REQUIRES, f"accepted {names(1 << bit)}, which requires one of {_listed(one_of, names)}")
        for bit, all_of in declared.requires_all.items():
            missing = [other for other in all_of if not accepted >> other & 1]
            if accepted >> bit & 1 and missing:
                self.broke(REQUIRES, f"accepted {names(1 << bit)}, which requires {_listed(missing, names)}")
        for feature, rule in _SHOULD_ACCEPT.items():
            if wished & feature.mask and not accepted & feature.mask:
                self.broke(rule, f"accepted {names(accepted)}")

    def _known(self) -> int:
        """Bits that the specification has for this type; all that can belong to a type it does not know."""
        known = sum(feature.mask for feature in Feature if feature not in _LEGACY)
        bits = device_type(self.core.device.device_id).features or self.core.device.feature_bits
        if bits is not None:
            return known | sum(1 << bit for bit in bits)
        return known | sum(1 << bit for bit in range(128) if is_device_type_bit(bit))


def _listed(bits: Iterable[int], names: Callable[[int], str]) -> str:
    return ", ".join(names(1 << bit) for bit in bits)
