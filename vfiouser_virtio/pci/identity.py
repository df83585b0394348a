"""Identity of a function (PCI Local Bus 3.0 §6.2.1): vendor, device, subsystem, class, revision."""

from dataclasses import dataclass, fields

from vfiouser_virtio.errors import ConfigError

_BITS = {"vendor": 16, "device": 16, "subsystem_vendor": 16, "subsystem": 16, "class_code": 24, "revision": 8}


@dataclass(frozen=True, slots=True)
class Identity:
    """Read-only ids by which a guest finds a driver; ``dataclasses.replace`` changes one of them.

    ``class_code`` is 24 bits: base class, sub-class, programming interface (0x018000 is "other mass storage").
    Raises ConfigError when a value does not fit its register, and for vendor 0xffff, which means "no device is here".
    """

    vendor: int
    device: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    class_code: int = 0
    revision: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, bits = getattr(self, field.name), _BITS[field.name]
            if not 0 <= value < 1 << bits:
                raise ConfigError(f"PCI {field.name} {value:#x} does not fit its {bits} bits")
        if self.vendor == 0xFFFF:
            raise ConfigError("PCI vendor 0xffff is what an empty slot reads as; choose another")
