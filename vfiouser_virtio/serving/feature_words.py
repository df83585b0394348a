"""Feature bits by name in a trace: what the 32 bits of ``device_feature`` and ``driver_feature`` say at the moment.

Which 32 they are, the driver has said in other messages (``device_feature_select``, ``driver_feature_select``; virtio
1.4, 4.1.4.3): so this listens to the whole conversation of one connection.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum

from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.serving.region_accesses import RegionAccess, region_accesses
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR
from vfiouser_virtio.vfio_user import Message
from vfiouser_virtio.virtio.driver_activity import feature_names

_REGISTERS = {COMMON + offset: name for name, (offset, _) in COMMON_CFG_OFFSETS.items()}
# virtio has 128 feature bits (2.2); a driver may select any words.
_WORDS = 4


class FeatureWords:
    """``of_type`` are the feature bits of the device's own type, by number."""

    def __init__(self, of_type: type[IntEnum] | None) -> None:
        self._of_type = of_type
        self._selected = {"device": 0, "driver": 0}

    def names(self, message: Message) -> list[str]:
        """The names of the bits in each access of ``message`` to a feature register: `SEG_MAX, VERSION_1`."""
        return list(self._said(region_accesses(message), read=message.is_reply))

    def _said(self, accesses: Sequence[RegionAccess], *, read: bool) -> Iterator[str]:
        for access in accesses:
            register = _REGISTERS.get(access.offset, "") if access.region == VIRTIO_BAR else ""
            side, _, field = register.partition("_")
            value = int.from_bytes(access.data, "little")
            if register == "device_status" and not read and not value:
                self._selected = dict.fromkeys(self._selected, 0)  # a reset
            elif side in self._selected and field == "feature_select" and not read:
                self._selected[side] = value
            elif side in self._selected and field == "feature" and len(access.data) == 4:
                word = self._selected[side]
                yield feature_names(value << 32 * word, self._of_type) if word < _WORDS else "none"
