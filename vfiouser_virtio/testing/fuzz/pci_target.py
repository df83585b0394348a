"""PCI devices of authors' own that are fuzzed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.fuzz_chip import FuzzChip
from vfiouser_virtio.testing.fuzz.register_map import RegisterMap
from vfiouser_virtio.virtio.device_checks import close_device


@dataclass(frozen=True, slots=True)
class PciTarget:
    """Device under test; add yours to `PCI_TARGETS`. It is made once more to look at its registers."""

    make: Callable[[], PciDevice]
    """A new device."""
    map: RegisterMap = field(init=False)

    def __post_init__(self) -> None:
        device = self.make()
        try:
            object.__setattr__(self, "map", RegisterMap.of(device))
        finally:
            close_device(device, device.name)

    def unknown(self, case: Case) -> str:
        """A register that the case names and the device does not have; empty where there is none."""
        named = (str(step["register"]) for step in case.steps if "register" in step)
        return next((name for name in named if name not in self.map.spots), "")


PCI_TARGETS: dict[str, PciTarget] = {"chip": PciTarget(FuzzChip)}
"""By the name that a case has."""
