"""Places of devices on the guest's PCI bus: the options ``addr`` and ``bus``, and functions of one slot."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from vfiouser_virtio.errors import ConfigError

logger = logging.getLogger(__name__)

_ADDR = r"(?i:(?:0x)?([0-9a-f]{1,2})(?:\.([0-7]))?)"
_SLOTS = 32
_ROOT_BUS = "pcie.0"
"""Where QEMU's machine q35 puts a device without ``bus``."""


class GuestSlot(NamedTuple):
    """Place of a function for QEMU, as far as the user has chosen it."""

    bus: str | None = None
    """QEMU's id of a bus, such as that of a pcie-root-port."""
    slot: int | None = None
    function: int = 0
    multifunction: bool = False
    """It is function 0 of a slot with more than one."""

    @property
    def addr(self) -> str:
        """As QEMU writes it: ``05.1``."""
        return f"{self.slot:02x}.{self.function:x}"


def guest_slot(addr: str | None, bus: str | None) -> GuestSlot:
    """The place that options say: ``5``, or ``5.1`` with the number of the function. Raises ConfigError."""
    if addr is None:
        return GuestSlot(bus)
    found = re.fullmatch(_ADDR, addr)
    slot = int(found[1], 16) if found else _SLOTS
    if found is None or slot >= _SLOTS:
        raise ConfigError(f"addr={addr}: expected SLOT or SLOT.FUNCTION in hex, from 0 to 1f.7")
    return GuestSlot(bus, slot, int(found[2] or "0"))


def with_functions(slots: Iterable[tuple[str, GuestSlot]]) -> list[GuestSlot]:
    """The places of devices, by name, with ``multifunction`` where it belongs.

    Raises ConfigError for two devices in one place. A slot without function 0, which another server may have, is worth
    a warning: a guest looks no further where there is none.
    """
    places = list(slots)
    by_slot: defaultdict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name, place in places:
        if place.slot is not None:
            functions = by_slot[place.bus or _ROOT_BUS, place.slot]
            if place.function in functions:
                raise ConfigError(f"{name} and {functions[place.function]} have the same addr={place.addr}")
            functions[place.function] = name
    for (_bus, slot), functions in by_slot.items():
        if 0 not in functions:
            name = next(iter(functions.values()))
            logger.warning(
                "%s: no device here has addr=%x.0, without which a guest finds no function of that slot. Where another "
                'server has it, add "multifunction":true to that one\'s -device',
                name,
                slot,
            )
    return [
        place._replace(multifunction=place.function == 0 and len(by_slot[place.bus or _ROOT_BUS, place.slot]) > 1)
        if place.slot is not None
        else place
        for _name, place in places
    ]
