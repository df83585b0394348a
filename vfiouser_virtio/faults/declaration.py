"""Declaration of a fault: what its name, arguments and effects are; help texts, documents and tests read it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS

_TIME = re.compile(r"(\d+(?:\.\d*)?)(ms|s)")


def integer(value: object) -> int:
    """A whole number, or a text such as ``-1`` or ``0x1f``. Raises ValueError or TypeError."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return int(value, 0) if isinstance(value, str) else value


def feature_bit(value: object) -> int:
    """The number of a feature bit, 0 to 127. Raises ValueError or TypeError."""
    number = integer(value)
    if not 0 <= number < FEATURE_BITS:
        raise ValueError
    return number


def seconds(value: object) -> float:
    """``50ms``, ``2s``, or a number of seconds up to a day. Raises ValueError or TypeError."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        number = float(match[1]) / (1000 if match[2] == "ms" else 1)
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    else:
        number = float(value)
    if not 0 <= number <= 86400:
        raise ValueError
    return number


def text(value: object) -> str:
    """A text that is not empty. Raises ValueError or TypeError."""
    if not isinstance(value, str):
        raise TypeError
    if not value:
        raise ValueError
    return value


def operation(value: object) -> str:
    """``read``, ``write`` or ``any``. Raises ValueError."""
    if value not in ("read", "write", "any"):
        raise ValueError
    return str(value)


def register(value: object) -> str:
    """The name of a register of the common configuration, or ``any``. Raises ValueError."""
    if value != "any" and value not in COMMON_CFG_OFFSETS:
        raise ValueError
    return str(value)


MADE = "making of the device"
"""What is counted of faults that are there before any driver."""


class Place(Enum):
    """Part of a device that a fault is in."""

    RING = "rings"
    DATA = "data"
    INTERRUPT = "interrupts"
    CONFIG = "configuration"
    STATUS = "status and features"
    PCI = "PCI"
    BLK = "disks"
    NET = "network devices"
    CONSOLE = "consoles"
    INPUT = "input devices"


@dataclass(frozen=True, slots=True)
class Argument:
    """Argument of a fault beside those that all have; ``default`` None: see ``help``."""

    name: str
    convert: Callable[[Any], object]
    default: object
    help: str

    @property
    def shown(self) -> str:
        """What help texts show after ``=``."""
        return "N" if self.convert in (integer, feature_bit) else "TIME" if self.convert is seconds else "TEXT"


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault that a device can be asked for."""

    name: str
    place: Place
    per: str
    """What is counted, and of which a schedule chooses some: "used buffer"."""
    does: str
    """What the device does then, and a driver sees."""
    breaks: str
    """The rule of virtio 1.4, or of what else is named, in short."""
    section: str
    """Where that rule is."""
    arguments: tuple[Argument, ...] = ()
    of_queue: bool = False
    """Each queue has its own count, and ``queue=`` chooses one."""
    ring: str = ""
    """Only on a "split" or a "packed" ring."""
    devices: str = "any"
    """The device types that can have it."""
    transport: str = "any"
    """PCI: a device without it cannot have it."""
    by_itself: bool = False
    """It can also be asked for by time alone, with no opportunity: ``at=5s``, ``every=2s``."""
