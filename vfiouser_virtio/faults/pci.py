"""PCI function with faults: registers, capabilities, and a core with the others."""

from functools import partial
from typing import Any

from vfiouser_virtio.faults.core import FaultyCore
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.faults.registers import FaultyCommonCfg
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Device


class FaultyPci(VirtioPci):
    """Virtio device on PCI with the faults of a plan; the rest is as with `VirtioPci`."""

    common_cfg = FaultyCommonCfg

    def __init__(self, device: Device, *, faults: FaultPlan, **named: Any) -> None:
        self.faults = faults
        super().__init__(device, core=partial(FaultyCore, faults=faults, transport="PCI"), **named)
