"""Feature bits by name in a trace: what the 32 bits of ``device_feature`` and ``driver_feature`` say at the moment.

Which 32 they are, the driver has said in other messages (``device_feature_select``, ``driver_feature_select``; virtio
1.4, 4.1.4.3): so this listens to the whole conversation of one connection.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import construct

from vfiouser_virtio.protocols.vfio_user import COMMANDS, Command, MessageFlags
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR
from vfiouser_virtio.vfio_user import Message
from vfiouser_virtio.virtio.driver_activity import feature_names

_ACCESSES = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)
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
        if message.command not in _ACCESSES or message.flags & MessageFlags.ERROR:
            return []
        if message.is_reply == (message.command != Command.REGION_READ):
            return []  # it has no data
        formats = COMMANDS[Command(message.command)]
        try:
            parsed = (formats.reply if message.is_reply else formats.request).parse(bytes(message.body))
        except construct.ConstructError:
            return []
        return list(self._said(parsed, read=message.is_reply))

    def _said(self, parsed: Any, *, read: bool) -> Iterator[str]:
        for each in parsed.get("wrs", [parsed]):
            access = each.get("access", each)
            register = _REGISTERS.get(access.offset, "") if access.region == VIRTIO_BAR else ""
            side, _, field = register.partition("_")
            value = int.from_bytes(each["data"][: access.count], "little")
            if register == "device_status" and not read and not value:
                self._selected = dict.fromkeys(self._selected, 0)  # a reset
            elif side in self._selected and field == "feature_select" and not read:
                self._selected[side] = value
            elif side in self._selected and field == "feature" and access.count == 4:
                word = self._selected[side]
                yield feature_names(value << 32 * word, self._of_type) if word < _WORDS else "none"
